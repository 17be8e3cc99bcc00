{{/* The name of all objects, short enough for what is added to it: pods, Services and their hashes. */}}
{{- define "pgvigil.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "pgvigil.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pgvigil.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- define "pgvigil.headless" -}}
{{- include "pgvigil.fullname" . }}-headless
{{- end -}}

{{- define "pgvigil.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pgvigil.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* By these, pods are found. They can never change, so nothing of the values but names stands here. */}}
{{- define "pgvigil.selector" -}}
app.kubernetes.io/name: {{ include "pgvigil.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: exporter
{{- end -}}

{{- define "pgvigil.labels" -}}
{{- $own := dict
    "app.kubernetes.io/name" (include "pgvigil.name" .)
    "app.kubernetes.io/instance" .Release.Name
    "app.kubernetes.io/version" .Chart.AppVersion
    "app.kubernetes.io/managed-by" .Release.Service
    "app.kubernetes.io/part-of" "pgvigil"
    "helm.sh/chart" (printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_")) -}}
{{- toYaml (merge $own .Values.commonLabels) -}}
{{- end -}}

{{- define "pgvigil.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "pgvigil.scheme" -}}
{{- ternary "https" "http" .Values.webConfig.tls -}}
{{- end -}}

{{/* Where each replica listens, as host:port. */}}
{{- define "pgvigil.addresses" -}}
{{- $name := include "pgvigil.fullname" . -}}
{{- $port := int .Values.service.port -}}
{{- $found := list -}}
{{- if eq .Values.mode "many" -}}
{{- range $ordinal := until (int .Values.replicas) -}}
{{- $host := printf "%s-%d.%s.%s.svc" $name $ordinal (include "pgvigil.headless" $) $.Release.Namespace -}}
{{- $found = append $found (printf "%s:%d" $host $port) -}}
{{- end -}}
{{- else -}}
{{- $found = append $found (printf "%s.%s.svc:%d" $name .Release.Namespace $port) -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* What the one target is called, in series and alerts. */}}
{{- define "pgvigil.instance" -}}
{{- keys .Values.targets | first | default (include "pgvigil.fullname" .) -}}
{{- end -}}
