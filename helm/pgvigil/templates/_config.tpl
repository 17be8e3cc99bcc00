{{/* The configuration file. It goes into a ConfigMap, so whatever may be a password is refused. */}}
{{- define "pgvigil.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "listen" (printf ":%d" (int .Values.service.port)) -}}
{{- if eq (include "pgvigil.catalogue" .) "true" -}}
{{- $_ := set $config "catalogue" (list "/etc/pgvigil-catalogue") -}}
{{- end -}}
{{- $targets := dict -}}
{{- range $name, $given := .Values.targets -}}
{{- $target := omit (deepCopy $given) "existingSecret" "password" -}}
{{- if or $given.existingSecret $given.password -}}
{{- $_ := set $target "password_file" (printf "passwords/%s" $name) -}}
{{- end -}}
{{- with mergeOverwrite (deepCopy $.Values.objectives) (deepCopy (default dict $given.objectives)) -}}
{{- $_ := set $target "objectives" . -}}
{{- end -}}
{{- $_ := set $targets $name $target -}}
{{- end -}}
{{- if $targets -}}
{{- $_ := set $config "targets" $targets -}}
{{- end -}}
{{- include "pgvigil.open" (list "config" .Values.config) -}}
{{- include "pgvigil.open" (list "targets" $targets) -}}
{{- /* JSON is YAML, and leaves no doubt what is a text: Helm's YAML writes some that others read as something else. */ -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* Whether there are queries of the operator's own. */}}
{{- define "pgvigil.catalogue" -}}
{{- if or .Values.catalogue.files .Values.catalogue.existingConfigMap }}true{{ end -}}
{{- end -}}

{{/* Refuse a password anywhere in (path, value): by its key, or within a text. */}}
{{- define "pgvigil.open" -}}
{{- $path := index . 0 -}}
{{- $value := index . 1 -}}
{{- if kindIs "map" $value -}}
{{- range $key, $inner := $value -}}
{{- if has $key (list "password" "sslpassword" "oauth_client_secret" "scram_client_key" "scram_server_key") -}}
{{- fail (printf "%s.%s: this would stand in a ConfigMap, where everybody reads it. Put it into a Secret: existingSecret of the target for a password, extraEnv with valueFrom or a file of extraVolumes for the rest" $path $key) -}}
{{- end -}}
{{- include "pgvigil.open" (list (printf "%s.%s" $path $key) $inner) -}}
{{- end -}}
{{- else if kindIs "slice" $value -}}
{{- range $number, $inner := $value -}}
{{- include "pgvigil.open" (list (printf "%s[%d]" $path $number) $inner) -}}
{{- end -}}
{{- else if kindIs "string" $value -}}
{{- if or
    (regexMatch "://[^@]*:[^@]*@" $value)
    (regexMatch "(?i)(pass|password|passphrase|secret|scram_client_key|scram_server_key)\\s*=" $value)
    (regexMatch "://.*[?&][^=&]*%[^=&]*=" $value) -}}
{{- fail (printf "%s: there seems to be a password in this text (not shown), and everybody could read it. Take it out and put it into a Secret: existingSecret of the target, or extraEnv with valueFrom" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Refuse values that do not go together; each message says what to do. */}}
{{- define "pgvigil.check" -}}
{{- $count := len .Values.targets -}}
{{- range $key, $own := dict "listen" "service.port" "targets" "targets" "catalogue" "catalogue" -}}
{{- if hasKey $.Values.config $key -}}
{{- fail (printf "config.%s: say it as %s" $key $own) -}}
{{- end -}}
{{- end -}}
{{- range $name, $target := .Values.targets -}}
{{- if gt (len (compact (list (ternary "1" "" (hasKey $target "existingSecret")) (ternary "1" "" (hasKey $target "password")) (ternary "1" "" (hasKey $target "password_file"))))) 1 -}}
{{- fail (printf "targets.%s: has more than one of existingSecret, password and password_file; keep one" $name) -}}
{{- end -}}
{{- if and $target.password (contains ":" $name) -}}
{{- fail (printf "targets.%s: no key of a Secret has a colon; name a Secret of yours in existingSecret" $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.objectives (not $count) -}}
{{- fail "objectives: they belong to targets, and there are none" -}}
{{- end -}}
{{- if and .Values.catalogue.files .Values.catalogue.existingConfigMap -}}
{{- fail "catalogue: has both files and existingConfigMap; keep one" -}}
{{- end -}}
{{- range $number, $variable := .Values.extraEnv -}}
{{- if and $variable.value (regexMatch "(PASSWORD|PASS|SECRET|TOKEN)$" $variable.name) -}}
{{- fail (printf "extraEnv[%d]: the value of %s would stand in the pod for everybody; take it from a Secret with valueFrom" $number $variable.name) -}}
{{- end -}}
{{- end -}}
{{- include "pgvigil.open" (list "extraEnv" .Values.extraEnv) -}}
{{- include "pgvigil.open" (list "extraArgs" .Values.extraArgs) -}}
{{- if eq .Values.mode "one" -}}
{{- if gt $count 1 -}}
{{- fail (printf "mode: it is one, and there are %d targets; say `mode: many`, with `replicas: 1` if one process shall watch them all" $count) -}}
{{- end -}}
{{- if not (or $count .Values.config .Values.extraEnv .Values.extraEnvFrom .Values.extraArgs) -}}
{{- fail "targets: whom shall it watch? Name a target, such as `targets: {orders: {connection: {host: db1, user: pgvigil}, existingSecret: {name: orders}}}`" -}}
{{- end -}}
{{- else if eq .Values.mode "many" -}}
{{- if not (or $count .Values.config) -}}
{{- fail "targets: whom shall they watch? Name targets" -}}
{{- end -}}
{{- if and .Values.probe.enabled (ne (int .Values.replicas) 1) -}}
{{- fail "probe: a Probe does not know which replica has a target; take scrapeConfig, or `replicas: 1`" -}}
{{- end -}}
{{- else -}}
{{- range $key, $why := dict
    "networkPolicy" "it would cut off what else is in these pods; add port and peers to their own"
    "podDisruptionBudget" "the pods are another chart's"
    "serviceMonitor" "there is no Service; take podMonitor"
    "scrapeConfig" "there is no Service; take podMonitor"
    "probe" "there is no Service; take podMonitor" -}}
{{- if (index $.Values $key).enabled -}}
{{- fail (printf "%s: not in mode sidecar: %s" $key $why) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.podMonitor.enabled (not .Values.podMonitor.selector) -}}
{{- fail "podMonitor.selector: name the labels of the pods that have the sidecar" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.probe.enabled (not $count) -}}
{{- fail "probe: it asks for targets by name, and there are none; take serviceMonitor" -}}
{{- end -}}
{{- range $key, $api := dict
    "serviceMonitor" "monitoring.coreos.com/v1/ServiceMonitor"
    "podMonitor" "monitoring.coreos.com/v1/PodMonitor"
    "probe" "monitoring.coreos.com/v1/Probe"
    "scrapeConfig" "monitoring.coreos.com/v1alpha1/ScrapeConfig"
    "prometheusRule" "monitoring.coreos.com/v1/PrometheusRule" -}}
{{- if and (index $.Values $key).enabled (not $.Values.assumeCRDs) (not ($.Capabilities.APIVersions.Has $api)) -}}
{{- fail (printf "%s: this cluster does not know %s. Install the CRDs of prometheus-operator first; where no cluster is asked (helm template), say `assumeCRDs: true` or `--api-versions %s`" $key $api $api) -}}
{{- end -}}
{{- end -}}
{{- end -}}
