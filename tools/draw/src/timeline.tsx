/** A state timeline; Grafana's own is no part of @grafana/ui, so this is drawn as it looks. */

import { type DataFrame, type TimeRange, dateTimeFormat, getFieldDisplayName } from '@grafana/data';
import { VizLegend, useTheme2 } from '@grafana/ui';

interface Stretch {
  from: number;
  to: number;
  text: string;
  color: string;
}

function stretches(frame: DataFrame, until: number): Stretch[] {
  const [time, value] = frame.fields;
  const found: Stretch[] = [];
  const step = time.config.interval ?? 0;
  value.values.forEach((raw, at) => {
    const { text, color = '#888', suffix = '' } = value.display!(raw);
    const [from, last] = [time.values[at], found[found.length - 1]];
    const follows = last && from - last.to <= step;
    if (follows && last.text === text + suffix) last.to = Math.min(from + step, until);
    else found.push({ from, to: Math.min(from + step, until), text: text + suffix, color });
  });
  return found;
}

export function Timeline(props: {
  frames: DataFrame[];
  width: number;
  height: number;
  range: TimeRange;
  legend: boolean;
}) {
  const theme = useTheme2();
  const { frames, width, height, range } = props;
  const names = frames.map((frame) => getFieldDisplayName(frame.fields[1], frame, frames));
  const side = Math.min(width / 3, 12 + 7 * Math.max(...names.map((name) => name.length)));
  const below = props.legend ? 52 : 22;
  const each = Math.max(2, (height - below) / frames.length);
  const [from, to] = [range.from.valueOf(), range.to.valueOf()];
  const x = (at: number) => side + ((at - from) / (to - from)) * (width - side);
  const rows = frames.map((frame) => stretches(frame, to));
  const states = new Map(rows.flat().map(({ text, color }) => [text, color]));
  const ticks = [0, 1, 2, 3, 4].map((at) => from + ((to - from) * (at + 0.5)) / 5);
  const size = theme.typography.bodySmall.fontSize;
  return (
    <div>
      <svg width={width} height={height - (props.legend ? 30 : 0)} style={{ fontSize: size }}>
        {rows.map((row, at) => (
          <g key={at}>
            <text
              x={side - 6}
              y={at * each + each / 2 + 4}
              textAnchor="end"
              fill={theme.colors.text.primary}
            >
              {names[at]}
            </text>
            {row.map((of, i) => {
              const wide = x(of.to) - x(of.from);
              const fits = wide > 8 * of.text.length && each > 14;
              return (
                <g key={i}>
                  <rect
                    x={x(of.from)}
                    y={at * each + each * 0.05}
                    width={Math.max(1, wide)}
                    height={each * 0.9}
                    fill={of.color}
                    fillOpacity={0.7}
                  />
                  {fits && (
                    <text
                      x={x(of.from) + 6}
                      y={at * each + each / 2 + 4}
                      fill={theme.colors.getContrastText(of.color)}
                    >
                      {of.text}
                    </text>
                  )}
                </g>
              );
            })}
          </g>
        ))}
        {ticks.map((at) => (
          <text
            key={at}
            x={x(at)}
            y={height - below + 16}
            textAnchor="middle"
            fill={theme.colors.text.primary}
          >
            {dateTimeFormat(at, { format: 'HH:mm:ss' })}
          </text>
        ))}
      </svg>
      {props.legend && (
        <VizLegend
          placement="bottom"
          items={[...states].map(([label, color]) => ({ label, color, yAxis: 1 }))}
        />
      )}
    </div>
  );
}
