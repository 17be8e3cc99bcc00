/** Draws one dashboard from a Prometheus; what and when is told by the address. */

import { createTheme, dateTime, type DataFrame, ThemeContext, type TimeRange } from '@grafana/data';
import { GlobalStyles, PanelChrome } from '@grafana/ui';
import { Component, type ReactNode } from 'react';
import { createRoot } from 'react-dom/client';

import { Prometheus } from './ask';
import type { Dashboard, Shown, Variable } from './dashboard';
import { made } from './fields';
import { Content, empty, type Mark } from './panels';

/** Pixels: Grafana's grid has 24 columns, a row of it is so high, with so much between. */
const [ROW, BETWEEN, MARGIN, HEAD] = [30, 8, 16, 48];

interface Drawn {
  panel: Shown;
  frames: DataFrame[];
  fault: string;
}

const told = new URLSearchParams(location.search);
const theme = createTheme({ colors: { mode: told.get('theme') === 'dark' ? 'dark' : 'light' } });
const width = (innerWidth - 2 * MARGIN + BETWEEN) / 24;
const wide = (of: Shown) => of.gridPos.w * width - BETWEEN;
const high = (of: Shown) => of.gridPos.h * (ROW + BETWEEN) - BETWEEN;

class Wall extends Component<{ children: ReactNode }, { fault: string }> {
  state = { fault: '' };
  static getDerivedStateFromError(error: Error) {
    return { fault: error.message };
  }
  componentDidCatch(error: Error) {
    console.error(error.message);
  }
  render() {
    return this.state.fault ? <pre>{this.state.fault}</pre> : this.props.children;
  }
}

/** What stands for all values: Grafana lists them where nothing else is told. */
function all(of: Variable, values: string[]) {
  const quoted = values.map((value) => value.replace(/[\\^$.*+?()[\]{}|]/g, '\\\\$&'));
  return of.allValue ?? `(${quoted.join('|')})`;
}

async function main() {
  const dashboard: Dashboard = await (await fetch(`/dashboards/${told.get('dashboard')}.json`)).json();
  const range = { from: Number(told.get('from')), to: Number(told.get('to')) };
  const prometheus = new Prometheus(told.get('prometheus')!, range, { datasource: 'prometheus' });
  for (const of of dashboard.templating.list) {
    if (of.type !== 'query') continue;
    const values = await prometheus.values(of);
    const wanted = told.get(of.name);
    prometheus.chosen[of.name] = wanted ?? (of.includeAll ? all(of, values) : (values[0] ?? ''));
  }
  const found = await Promise.all(dashboard.annotations.list.map((of) => prometheus.moments(of)));
  const marks = dashboard.annotations.list.flatMap((of, i) =>
    found[i].map((at): Mark => ({ at, color: theme.visualization.getColorByName(of.iconColor) })),
  );
  const drawn: Drawn[] = [];
  for (const panel of dashboard.panels) {
    try {
      const frames = await prometheus.frames(panel, wide(panel));
      drawn.push({ panel, frames: await made(panel, frames, theme), fault: '' });
    } catch (error) {
      drawn.push({ panel, frames: [], fault: String(error) });
    }
  }
  const times: TimeRange = {
    from: dateTime(range.from * 1000),
    to: dateTime(range.to * 1000),
    raw: { from: 'now-1h', to: 'now' },
  };
  const tall = Math.max(...dashboard.panels.map(({ gridPos: of }) => of.y + of.h));
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <Page dashboard={dashboard} chosen={prometheus.chosen} tall={tall}>
        {drawn.map((of) => (
          <Placed key={of.panel.id} of={of} times={times} marks={marks} />
        ))}
      </Page>
    </ThemeContext.Provider>,
  );
  const panels = drawn.filter(({ panel }) => panel.type !== 'row');
  const report = {
    height: HEAD + tall * (ROW + BETWEEN) + MARGIN,
    empty: panels.filter((of) => empty(of.panel.type, of.frames) && !of.fault).map(({ panel }) => panel.title),
    faults: panels.filter((of) => of.fault).map(({ panel, fault }) => `${panel.title}: ${fault}`),
  };
  Object.assign(window, { report, cut });
}

/** Titles for which there is no room. */
function cut(): string[] {
  return [...document.querySelectorAll('h2')]
    .filter((of) => of.scrollWidth > of.clientWidth)
    .map((of) => of.textContent ?? '');
}

function Page(props: {
  dashboard: Dashboard;
  chosen: Record<string, string>;
  tall: number;
  children: ReactNode;
}) {
  const shown = props.dashboard.templating.list.filter(({ type }) => type === 'query');
  return (
    <div
      style={{
        background: theme.colors.background.canvas,
        height: HEAD + props.tall * (ROW + BETWEEN) + MARGIN,
        position: 'relative',
      }}
    >
      <div style={{ display: 'flex', gap: 24, lineHeight: `${HEAD}px`, paddingLeft: MARGIN }}>
        <strong>{props.dashboard.title}</strong>
        {shown.map(({ name, label }) => (
          <span key={name}>
            <span style={{ color: theme.colors.text.secondary }}>{label}</span>{' '}
            {/^([.][*+]|[(].*[)])$/.test(props.chosen[name]) ? 'All' : props.chosen[name]}
          </span>
        ))}
      </div>
      {props.children}
    </div>
  );
}

function Placed({ of, times, marks }: { of: Drawn; times: TimeRange; marks: Mark[] }) {
  const { panel, frames, fault } = of;
  const place = {
    left: MARGIN + panel.gridPos.x * width,
    top: HEAD + panel.gridPos.y * (ROW + BETWEEN),
    position: 'absolute' as const,
  };
  if (panel.type === 'row') {
    return <div style={{ ...place, fontWeight: 500, lineHeight: `${ROW}px` }}>⌄ {panel.title}</div>;
  }
  return (
    <div style={place}>
      <PanelChrome
        title={panel.title}
        description={panel.description}
        width={wide(panel)}
        height={high(panel)}
        padding={panel.type === 'table' ? 'none' : 'md'}
      >
        {(width, height) => (
          <Wall>
            {fault ? (
              <pre>{fault}</pre>
            ) : (
              <Content {...{ panel, frames, marks, width, height }} range={times} />
            )}
          </Wall>
        )}
      </PanelChrome>
    </div>
  );
}

main().catch((error) => {
  console.error(error);
  Object.assign(window, { report: { height: 100, empty: [], faults: [String(error)] } });
});
