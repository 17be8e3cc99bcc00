{{/* The container, in a pod of ours or of another chart. */}}
{{- define "pgvigil.container" -}}
name: pgvigil
image: {{ include "pgvigil.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - serve
  - --config=/etc/pgvigil/pgvigil.yml
  {{- if or .Values.reload (eq .Values.mode "sidecar") }}
  - --watch-config
  {{- end }}
  {{- with .Values.webConfig.existingSecret }}
  - {{ printf "--web-config=/etc/pgvigil-web/%s" $.Values.webConfig.key | quote }}
  {{- end }}
  {{- with .Values.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if or (eq .Values.mode "many") .Values.extraEnv }}
env:
  {{- if eq .Values.mode "many" }}
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  # The replica's number stands at the end of its name, on every version of Kubernetes.
  - name: PGVIGIL_SHARD
    value: "$(POD_NAME)/{{ int .Values.replicas }}"
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - {name: {{ include "pgvigil.port" . }}, containerPort: {{ int .Values.service.port }}, protocol: TCP}
livenessProbe:
  {{- include "pgvigil.health" (list . .Values.livenessProbe "/livez") | nindent 2 }}
readinessProbe:
  {{- include "pgvigil.health" (list . .Values.readinessProbe "/readyz") | nindent 2 }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: pgvigil, mountPath: /etc/pgvigil, readOnly: true}
  {{- if include "pgvigil.catalogue" . }}
  - {name: pgvigil-catalogue, mountPath: /etc/pgvigil-catalogue, readOnly: true}
  {{- end }}
  {{- if .Values.webConfig.existingSecret }}
  - {name: pgvigil-web, mountPath: /etc/pgvigil-web, readOnly: true}
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The port's name: in a pod of another chart, `http` may be taken. */}}
{{- define "pgvigil.port" -}}
{{- ternary "pgvigil" "http" (eq .Values.mode "sidecar") -}}
{{- end -}}

{{/* A probe: what the values say, or the path. */}}
{{- define "pgvigil.health" -}}
{{- $root := index . 0 -}}
{{- with index . 1 -}}
{{- toYaml . -}}
{{- else -}}
httpGet:
  path: {{ index . 2 }}
  port: {{ include "pgvigil.port" $root }}
  scheme: {{ include "pgvigil.scheme" $root | upper }}
periodSeconds: 10
timeoutSeconds: 5
failureThreshold: 3
{{- end -}}
{{- end -}}

{{/* All that it reads. One volume has the configuration and the passwords, so that the file names them beside it. */}}
{{- define "pgvigil.volumes" -}}
{{- $name := include "pgvigil.fullname" . -}}
- name: pgvigil
  projected:
    # Whatever user the container has; nobody else sees this volume.
    defaultMode: 0444
    sources:
      - configMap: {name: {{ $name }}}
      {{- range $target, $of := .Values.targets }}
      {{- if $of.existingSecret }}
      - secret:
          name: {{ $of.existingSecret.name | quote }}
          items: [{key: {{ default "password" $of.existingSecret.key | quote }}, path: {{ printf "passwords/%s" $target | quote }}}]
      {{- else if $of.password }}
      - secret:
          name: {{ $name }}
          items: [{key: {{ $target | quote }}, path: {{ printf "passwords/%s" $target | quote }}}]
      {{- end }}
      {{- end }}
{{- if include "pgvigil.catalogue" . }}
- name: pgvigil-catalogue
  configMap: {name: {{ default (printf "%s-catalogue" $name) .Values.catalogue.existingConfigMap }}}
{{- end }}
{{- with .Values.webConfig.existingSecret }}
- name: pgvigil-web
  secret: {secretName: {{ . | quote }}, defaultMode: 0444}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Changes with the configuration, where it is read once. Passwords are read at each new connection. */}}
{{- define "pgvigil.annotations" -}}
{{- if not .Values.reload -}}
checksum/config: {{ list (include "pgvigil.config" .) .Values.catalogue.files | toJson | sha256sum }}
{{- end -}}
{{- end -}}

{{/* A whole pod. */}}
{{- define "pgvigil.pod" -}}
metadata:
  labels:
    {{- toYaml (merge (include "pgvigil.selector" . | fromYaml) .Values.podLabels .Values.commonLabels) | nindent 4 }}
  {{- with merge (include "pgvigil.annotations" . | fromYaml) .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "pgvigil.serviceAccountName" . }}
  automountServiceAccountToken: false
  # A Service called pgvigil would put PGVIGIL_PORT into the environment.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int .Values.terminationGracePeriodSeconds }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  containers:
    - {{- include "pgvigil.container" . | nindent 6 }}
  volumes:
    {{- include "pgvigil.volumes" . | nindent 4 }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    {{- $own := dict "matchLabels" (include "pgvigil.selector" $ | fromYaml) }}
    - {{- toYaml (set (deepCopy .) "labelSelector" (default $own .labelSelector)) | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end -}}
