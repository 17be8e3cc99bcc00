/** What a panel's JSON says of its fields, applied by Grafana's own code. */

import {
  type DataFrame,
  type FieldConfigPropertyItem,
  FieldColorModeId,
  FieldConfigOptionsRegistry,
  type GrafanaTheme2,
  type TransformerRegistryItem,
  applyFieldOverrides,
  cacheFieldDisplayNames,
  standardTransformers,
  standardTransformersRegistry,
  transformDataFrame,
} from '@grafana/data';
import { lastValueFrom } from 'rxjs';

import type { Shown } from './dashboard';

/** The properties that our JSON uses, with what Grafana's panels take where nothing is said. */
const PROPERTIES: Record<string, unknown> = {
  unit: undefined,
  decimals: undefined,
  min: undefined,
  max: undefined,
  displayName: undefined,
  noValue: undefined,
  thresholds: undefined,
  mappings: undefined,
  links: undefined,
  color: undefined,
  'custom.align': 'auto',
  'custom.axisPlacement': 'auto',
  'custom.axisSoftMin': undefined,
  'custom.axisSoftMax': undefined,
  'custom.cellOptions': { type: 'auto' },
  'custom.drawStyle': 'line',
  'custom.fillOpacity': 0,
  'custom.filterable': false,
  'custom.gradientMode': 'none',
  'custom.hidden': undefined,
  'custom.hideFrom': undefined,
  'custom.lineInterpolation': 'linear',
  'custom.lineStyle': undefined,
  'custom.lineWidth': 1,
  'custom.minWidth': undefined,
  'custom.pointSize': 5,
  'custom.scaleDistribution': { type: 'linear' },
  'custom.showPoints': 'auto',
  'custom.spanNulls': false,
  'custom.stacking': { mode: 'none', group: 'A' },
  'custom.width': undefined,
};

const REGISTRY = new FieldConfigOptionsRegistry(() =>
  Object.entries(PROPERTIES).map(([id, usual]) => {
    const custom = id.startsWith('custom.');
    const item: Partial<FieldConfigPropertyItem> = {
      id,
      name: id,
      path: custom ? id.slice('custom.'.length) : id,
      isCustom: custom,
      process: (value) => value ?? usual,
      shouldApply: () => true,
    };
    return item as FieldConfigPropertyItem;
  }),
);

standardTransformersRegistry.setInit(() =>
  [standardTransformers.mergeTransformer, standardTransformers.organizeFieldsTransformer].map(
    (of) => ({ id: of.id, name: of.name, transformation: async () => of }) as unknown as TransformerRegistryItem,
  ),
);

export async function made(
  panel: Shown,
  frames: DataFrame[],
  theme: GrafanaTheme2,
): Promise<DataFrame[]> {
  const steps = panel.transformations ?? [];
  const unknown = steps.find(({ id }) => !standardTransformersRegistry.getIfExists(id));
  if (unknown) throw new Error(`the transformation ${unknown.id} is not drawn here`);
  const context = { interpolate: (text: string) => text };
  const data = await lastValueFrom(transformDataFrame(steps, frames, context));
  const told = panel.fieldConfig;
  for (const { properties } of [...told.overrides]) {
    const strange = properties.find(({ id }) => !REGISTRY.getIfExists(id));
    if (strange) throw new Error(`the property ${strange.id} is not drawn here`);
  }
  // Applying leaves traces in what is given.
  const fieldConfig = structuredClone(told);
  fieldConfig.defaults.color ??= { mode: FieldColorModeId.PaletteClassic };
  const custom = Object.keys(told.defaults.custom ?? {});
  const strange = custom.find((name) => !REGISTRY.getIfExists(`custom.${name}`));
  if (strange) throw new Error(`the property custom.${strange} is not drawn here`);
  const applied = applyFieldOverrides({
    data,
    fieldConfig,
    fieldConfigRegistry: REGISTRY,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'browser',
  });
  cacheFieldDisplayNames(applied);
  return applied;
}
