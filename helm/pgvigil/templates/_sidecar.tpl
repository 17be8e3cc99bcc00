{{/*
For the pods of another chart that depends on this one with `mode: sidecar`:

    containers:
      - {{- include "pgvigil.sidecar" .Subcharts.pgvigil | nindent 10 }}
    volumes:
      {{- include "pgvigil.sidecar.volumes" .Subcharts.pgvigil | nindent 8 }}

and among the pod's annotations, so that a change of the configuration replaces it:

    {{- include "pgvigil.sidecar.annotations" .Subcharts.pgvigil | nindent 8 }}
*/}}
{{- define "pgvigil.sidecar" -}}
{{- include "pgvigil.container" . -}}
{{- end -}}

{{- define "pgvigil.sidecar.volumes" -}}
{{- include "pgvigil.volumes" . -}}
{{- end -}}

{{- define "pgvigil.sidecar.annotations" -}}
{{- include "pgvigil.annotations" . -}}
{{- end -}}
