/** Each panel by Grafana's own component for it. */

import {
  type DataFrame,
  FieldType,
  type TimeRange,
  VizOrientation,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
} from '@grafana/data';
import {
  BarGauge,
  BigValue,
  TimeSeries,
  type UPlotConfigBuilder,
  VizRepeater,
  useTheme2,
} from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';

import type { Shown } from './dashboard';
import { Timeline } from './timeline';

export interface Mark {
  at: number;
  color: string;
}

interface Props {
  panel: Shown;
  frames: DataFrame[];
  range: TimeRange;
  marks: Mark[];
  width: number;
  height: number;
}

/** A table may be of words alone. */
export function empty(kind: string, frames: DataFrame[]): boolean {
  return !frames.some(
    ({ fields, length }) => length && (kind === 'table' || fields.some(({ type }) => type === FieldType.number)),
  );
}

export function Content(props: Props) {
  const theme = useTheme2();
  const { panel, frames } = props;
  const kind = panel.type;
  if (empty(kind, frames) && kind !== 'stat' && kind !== 'bargauge') {
    const text = panel.fieldConfig.defaults.noValue ?? 'No data';
    return (
      <div
        style={{
          alignItems: 'center',
          color: theme.colors.text.secondary,
          display: 'flex',
          height: props.height,
          justifyContent: 'center',
          padding: 16,
          textAlign: 'center',
        }}
      >
        {text}
      </div>
    );
  }
  const draw = KINDS[kind];
  if (!draw) throw new Error(`a panel of type ${kind} is not drawn here`);
  return draw(props);
}

const KINDS: Record<string, (props: Props) => React.ReactNode> = {
  timeseries: Lines,
  table: ({ panel, frames, range, width, height }) => (
    <TableNG
      data={frames[0]}
      width={width}
      height={height}
      sortBy={panel.options.sortBy}
      noHeader={!panel.options.showHeader}
      timeRange={range}
      fieldConfig={panel.fieldConfig}
      structureRev={1}
    />
  ),
  stat: Values,
  bargauge: Values,
  'state-timeline': ({ panel, frames, range, width, height }) => (
    <Timeline
      frames={frames}
      width={width}
      height={height}
      range={range}
      legend={panel.options.legend.showLegend}
    />
  ),
};

function Lines({ panel, frames, range, marks, width, height }: Props) {
  const mark = (builder: UPlotConfigBuilder) => {
    builder.addHook('draw', (plot) => {
      for (const { at, color } of marks) {
        const x = Math.round(plot.valToPos(at, 'x', true));
        plot.ctx.save();
        plot.ctx.strokeStyle = color;
        plot.ctx.setLineDash([4, 4]);
        plot.ctx.beginPath();
        plot.ctx.moveTo(x, plot.bbox.top);
        plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
        plot.ctx.stroke();
        plot.ctx.restore();
      }
    });
    return null;
  };
  return (
    <TimeSeries
      frames={frames}
      width={width}
      height={height}
      timeRange={range}
      timeZone="browser"
      legend={{ calcs: [], ...panel.options.legend }}
      options={panel.options}
    >
      {mark}
    </TimeSeries>
  );
}

function Values({ panel, frames, width, height }: Props) {
  const theme = useTheme2();
  const { options } = panel;
  const values = () =>
    getFieldDisplayValues({
      data: frames,
      fieldConfig: panel.fieldConfig,
      reduceOptions: options.reduceOptions,
      replaceVariables: (text) => text,
      theme,
      timeZone: 'browser',
    });
  return (
    <VizRepeater
      width={width}
      height={height}
      source={frames}
      getValues={values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderCounter={1}
      orientation={options.orientation as VizOrientation}
      itemSpacing={panel.type === 'stat' ? 3 : 10}
      autoGrid
      renderValue={({ value, width, height, alignmentFactors, count, orientation }) =>
        panel.type === 'stat' ? (
          <BigValue
            theme={theme}
            width={width}
            height={height}
            value={value.display}
            count={count}
            alignmentFactors={alignmentFactors}
            colorMode={options.colorMode}
            graphMode={options.graphMode}
            textMode={options.textMode}
          />
        ) : (
          <BarGauge
            theme={theme}
            width={width}
            height={height}
            field={value.field}
            display={value.view?.getFieldDisplayProcessor(value.colIndex!)}
            value={value.display}
            alignmentFactors={alignmentFactors}
            orientation={orientation}
            displayMode={options.displayMode}
            showUnfilled={options.showUnfilled}
          />
        )
      }
    />
  );
}
