/** What our dashboards consist of: as much of Grafana's model as their JSON uses. */

import type { DataTransformerConfig, FieldConfigSource } from '@grafana/data';
import type { AnnotationQuery, Panel, VariableModel } from '@grafana/schema';

export interface Target {
  refId: string;
  expr: string;
  legendFormat: string;
  instant: boolean;
  format?: string;
}

export type Shown = Omit<Panel, 'targets' | 'options' | 'fieldConfig' | 'transformations'> & {
  type: string;
  title: string;
  gridPos: { x: number; y: number; w: number; h: number };
  targets?: Target[];
  options: Record<string, any>;
  fieldConfig: FieldConfigSource;
  transformations?: DataTransformerConfig[];
};

export interface Variable extends VariableModel {
  name: string;
  query: { query: string } | string;
  regex: string;
  multi?: boolean;
  includeAll?: boolean;
  allValue?: string;
}

export type Marked = AnnotationQuery & {
  expr: string;
  iconColor: string;
  step: string;
  useValueForTime: boolean;
};

export interface Dashboard {
  title: string;
  panels: Shown[];
  templating: { list: Variable[] };
  annotations: { list: Marked[] };
}
