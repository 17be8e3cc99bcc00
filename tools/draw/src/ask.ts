/** Asks Prometheus as Grafana's data source would, and makes data frames of the answers. */

import {
  type DataFrame,
  type Field,
  FieldType,
  createDataFrame,
  renderLegendFormat,
} from '@grafana/data';

import type { Marked, Shown, Target, Variable } from './dashboard';

type Labels = Record<string, string>;
type Point = [number, string];
interface Series {
  metric: Labels;
  value?: Point;
  values?: Point[];
}

/** Seconds between scrapes of the Prometheus that is asked; Grafana is told it, too. */
const SCRAPED = 1;

export interface Range {
  from: number;
  to: number;
}

export class Prometheus {
  constructor(
    private readonly url: string,
    private readonly range: Range,
    readonly chosen: Record<string, string> = {},
  ) {}

  /** The expression with what was chosen in the places of variables. */
  replaced(text: string, step = SCRAPED): string {
    const given: Record<string, string> = {
      ...this.chosen,
      __rate_interval: `${Math.max(step + SCRAPED, 4 * SCRAPED)}s`,
      __interval: `${step}s`,
      __range: `${Math.round(this.range.to - this.range.from)}s`,
    };
    return text.replace(/\$(?:\{(\w+)(?::\w+)?\}|(\w+))/g, (whole, braced, plain) => {
      return given[braced ?? plain] ?? whole;
    });
  }

  /** The frames of a panel, before anything is made of them. */
  async frames(panel: Shown, width: number): Promise<DataFrame[]> {
    const targets = panel.targets ?? [];
    const frames = await Promise.all(targets.map((of) => this.frame(of, width, targets.length)));
    return frames.flat();
  }

  private async frame(of: Target, width: number, count: number): Promise<DataFrame[]> {
    const step = this.step(width);
    const series = of.instant
      ? await this.instant(this.replaced(of.expr, step))
      : await this.over(this.replaced(of.expr, step), step);
    if (of.format === 'table') {
      return series.length ? [table(of, series, count > 1)] : [];
    }
    return series.map((found) => line(of, found, step));
  }

  private step(width: number): number {
    return Math.max(SCRAPED, Math.ceil((this.range.to - this.range.from) / width));
  }

  /** The moments that an annotation marks, in milliseconds. */
  async moments(of: Marked): Promise<number[]> {
    const step = parseInt(of.step, 10) > 60 ? parseInt(of.step, 10) : SCRAPED;
    const found: number[] = [];
    for (const series of await this.over(this.replaced(of.expr), step)) {
      let last = -Infinity;
      for (const [at, value] of series.values ?? []) {
        if (of.useValueForTime) {
          found.push(Number(value));
        } else if (value !== '0') {
          // What follows at once is the same event, and only where it begins is marked here.
          if (at - last > 2 * step) found.push(at * 1000);
          last = at;
        }
      }
    }
    const [from, to] = [this.range.from * 1000, this.range.to * 1000];
    return [...new Set(found)].filter((at) => from < at && at < to);
  }

  /** The values that a variable may have, as Grafana finds them by our two functions. */
  async values(of: Variable): Promise<string[]> {
    const text = this.replaced(typeof of.query === 'string' ? of.query : of.query.query);
    const labels = /^label_values\((.+), (\w+)\)$/.exec(text);
    if (labels) {
      return this.get(`label/${labels[2]}/values`, {
        'match[]': labels[1],
        start: this.range.from,
        end: this.range.to,
      });
    }
    const result = /^query_result\((.+)\)$/.exec(text);
    if (!result) throw new Error(`variable ${of.name}: ${text} is none of our functions`);
    return (await this.instant(result[1])).map((found) => found.metric[of.name] ?? '');
  }

  private async instant(query: string): Promise<Series[]> {
    return (await this.get('query', { query, time: this.range.to })).result;
  }

  private async over(query: string, step: number): Promise<Series[]> {
    const { from, to } = this.range;
    const start = Math.floor(from / step) * step;
    return (await this.get('query_range', { query, start, end: to, step })).result;
  }

  private async get(path: string, given: Record<string, string | number>): Promise<any> {
    const asked = new URLSearchParams();
    Object.entries(given).forEach(([name, value]) => asked.set(name, String(value)));
    const answer = await (await fetch(`${this.url}/api/v1/${path}?${asked}`)).json();
    if (answer.status !== 'success') throw new Error(`${given.query}: ${answer.error}`);
    return answer.data;
  }
}

function line(of: Target, series: Series, step: number): DataFrame {
  const points = series.values ?? (series.value ? [series.value] : []);
  return createDataFrame({
    refId: of.refId,
    fields: [
      {
        name: 'Time',
        type: FieldType.time,
        config: { interval: step * 1000 },
        values: points.map(([at]) => at * 1000),
      },
      {
        name: 'Value',
        type: FieldType.number,
        labels: series.metric,
        config: { displayNameFromDS: legend(of.legendFormat, series.metric) },
        // The panel of Grafana leaves a gap, too, where a number is none or has no end.
        values: points.map(([, value]) => (isFinite(Number(value)) ? Number(value) : null)),
      },
    ],
  });
}

/** A label that is not there leaves nothing in Grafana's legends, and its name in this function. */
function legend(format: string, labels: Labels): string {
  const known = format.replace(/\{\{\s*(\w+)\s*\}\}/g, (whole, name) => (name in labels ? whole : ''));
  return renderLegendFormat(known, labels);
}

function table(of: Target, series: Series[], several: boolean): DataFrame {
  const names = [...new Set(series.flatMap((found) => Object.keys(found.metric)))].sort();
  const labels = names.map((name): Field => {
    const values = series.map((found) => found.metric[name] ?? '');
    return { name, type: FieldType.string, config: { filterable: true }, values };
  });
  return createDataFrame({
    refId: of.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: series.map((of) => of.value![0] * 1000) },
      ...labels,
      {
        name: several ? `Value #${of.refId}` : 'Value',
        type: FieldType.number,
        values: series.map((of) => Number(of.value![1])),
      },
    ],
  });
}
