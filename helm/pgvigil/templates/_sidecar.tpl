{{/*
For the pods of another chart that depends on this one with `mode: sidecar`:

    containers:
      - {{- include "pgvigil.sidecar" .Subcharts.pgvigil | nindent 10 }}
    volumes:
      {{- include "pgvigil.sidecar.volumes" .Subcharts.pgvigil | nindent 8 }}

A new configuration is taken while it runs: nobody restarts a database for it.
*/}}
{{- define "pgvigil.sidecar" -}}
{{- include "pgvigil.container" . -}}
{{- end -}}

{{- define "pgvigil.sidecar.volumes" -}}
{{- include "pgvigil.volumes" . -}}
{{- end -}}
