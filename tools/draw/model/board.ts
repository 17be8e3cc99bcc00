/** What our dashboards may be, in the types of Grafana: excess and misspelt names are faults, too. */

import type {
  AnnotationQuery,
  Dashboard,
  DashboardLink,
  DataQuery,
  FieldConfig,
  Panel,
  RowPanel,
  VariableModel,
} from '@grafana/schema';
import type * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as statetimeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

/** As it stands in JSON, where a member of an enumeration is its text. */
type Plain<T> = T extends string
  ? `${T}`
  : T extends object
    ? { [Name in keyof T]: Plain<T[Name]> }
    : T;

/** Those of Prometheus; the package of their own types brings half of Grafana with it. */
interface Query extends DataQuery {
  datasource: { type: 'prometheus'; uid: string };
  expr: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
  format?: 'table';
}

/** One setting that fields of some name have instead. */
type Setting<Of, Prefix extends string> = {
  [Name in keyof Of & string]-?: { id: `${Prefix}${Name}`; value: Of[Name] };
}[keyof Of & string];

type Common = Omit<FieldConfig, 'custom'>;

/** Grafana fills in the options that are not there; links of a panel are its data links. */
type Shown<Type extends string, Options, Custom> = Omit<
  Panel,
  'type' | 'targets' | 'options' | 'fieldConfig' | 'links'
> & {
  type: Type;
  title: string;
  description: string;
  targets: Query[];
  options: Partial<Options>;
  links: (Pick<DashboardLink, 'title' | 'url'> & { targetBlank?: boolean })[];
  fieldConfig: {
    defaults: Common & { custom?: Partial<Custom> };
    overrides: {
      matcher: { id: 'byName' | 'byRegexp'; options: string };
      properties: (Setting<Common, ''> | Setting<Custom, 'custom.'>)[];
    }[];
  };
};

/** Prometheus' own of an annotation, beside Grafana's. */
interface Marked extends AnnotationQuery {
  expr: string;
  step: string;
  titleFormat: string;
  useValueForTime: boolean;
}

interface Chosen extends VariableModel {
  definition?: string;
}

interface Whole extends Omit<Dashboard, 'panels' | 'templating' | 'annotations'> {
  templating: { list: Chosen[] };
  annotations: { list: Marked[] };
  panels: (
    | RowPanel
    | Shown<'timeseries', timeseries.Options, timeseries.FieldConfig>
    | Shown<'table', table.Options, table.FieldConfig>
    | Shown<'state-timeline', statetimeline.Options, statetimeline.FieldConfig>
    | Shown<'stat', stat.Options, object>
    | Shown<'bargauge', bargauge.Options, object>
  )[];
}

export type Board = Plain<Whole>;
