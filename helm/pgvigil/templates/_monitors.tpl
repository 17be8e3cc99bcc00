{{/* What all objects of the operator say alike, of (values of one, key of the interval). */}}
{{- define "pgvigil.scraping" -}}
{{- $monitor := index . 0 -}}
{{- $found := dict -}}
{{- with $monitor.interval -}}{{- $_ := set $found (index $ 1) . -}}{{- end -}}
{{- range $key := list "scrapeTimeout" "tlsConfig" "basicAuth" "metricRelabelings" -}}
{{- with index $monitor $key -}}{{- $_ := set $found $key . -}}{{- end -}}
{{- end -}}
{{- with $found -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* An endpoint of a monitor, of (root, values of one): names that outlive the pod's address. */}}
{{- define "pgvigil.endpoint" -}}
{{- $root := index . 0 -}}
{{- $monitor := index . 1 -}}
{{- $many := eq $root.Values.mode "many" -}}
port: {{ include "pgvigil.port" $root }}
path: /metrics
scheme: {{ include "pgvigil.scheme" $root }}
relabelings:
  - {targetLabel: job, replacement: {{ ternary "pgvigil" "postgresql" $many }}}
  {{- if eq $root.Values.mode "one" }}
  - {targetLabel: instance, replacement: {{ include "pgvigil.instance" $root | quote }}}
  {{- else }}
  - {sourceLabels: [__meta_kubernetes_pod_name], targetLabel: instance}
  {{- end }}
  {{- with $monitor.relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with include "pgvigil.scraping" (list $monitor "interval") }}
{{ . }}
{{- end }}
{{- end -}}
