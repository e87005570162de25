{{/* What a schema cannot say: values that contradict each other are refused in words. Yields nothing. */}}
{{- define "controlplane.checks" -}}
{{- $settings := .Values.settings -}}
{{- $secrets := .Values.secrets -}}
{{- $given := or $secrets.databaseUrl.existingSecret $secrets.databaseUrl.value -}}
{{- if and .Values.cloudnativepg.enabled $given -}}
{{- fail "secrets.databaseUrl and cloudnativepg.enabled: keep one of the two databases" -}}
{{- end -}}
{{- $token := or $secrets.slurmToken.existingSecret $secrets.slurmToken.value -}}
{{- $key := $secrets.slurmJwtKey.existingSecret -}}
{{- $command := $settings.CONTROLPLANE_SLURM__TOKEN_COMMAND -}}
{{- if gt (len (compact (list $token $key $command))) 1 -}}
{{- fail "secrets.slurmToken, secrets.slurmJwtKey, settings.CONTROLPLANE_SLURM__TOKEN_COMMAND: keep one way to a Slurm token" -}}
{{- end -}}
{{- $url := $settings.CONTROLPLANE_SLURM__URL | default "" -}}
{{- if and $url (not (hasPrefix "unix:" $url)) (not (or $token $key $command)) -}}
{{- fail "settings.CONTROLPLANE_SLURM__URL: slurmrestd wants a token over HTTP; name secrets.slurmToken.existingSecret or secrets.slurmJwtKey.existingSecret" -}}
{{- end -}}
{{- if and (not $url) (or $token $key $command) -}}
{{- fail "a way to a Slurm token is given, but settings.CONTROLPLANE_SLURM__URL is not: set both, or neither" -}}
{{- end -}}
{{- if and .Values.replicaSets .Values.replicaSetsSecret -}}
{{- fail "replicaSets and replicaSetsSecret: keep one of the two" -}}
{{- end -}}
{{- if and .Values.proxy.ingress.enabled (not .Values.proxy.ingress.hosts) -}}
{{- fail "proxy.ingress.hosts: name at least one host" -}}
{{- end -}}
{{- if and .Values.proxy.httpRoute.enabled (not .Values.proxy.httpRoute.parentRefs) -}}
{{- fail "proxy.httpRoute.parentRefs: name the gateway" -}}
{{- end -}}
{{- if gt (int .Values.proxy.autoscaling.minReplicas) (int .Values.proxy.autoscaling.maxReplicas) -}}
{{- fail "proxy.autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- $signed := or $secrets.webhookHmacSecrets.existingSecret $secrets.webhookHmacSecrets.value -}}
{{- $header := $settings.CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER | default "" -}}
{{- if and .Values.grafana.alerts.enabled $signed (ne (lower $header) "x-grafana-alerting-timestamp") -}}
{{- fail "settings.CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER: set X-Grafana-Alerting-Timestamp, with which the contact point of grafana.alerts signs, or every alert is refused" -}}
{{- end -}}
{{- if and .Values.prometheus.dcgm.enabled (not .Values.prometheus.dcgm.targets) -}}
{{- fail "prometheus.dcgm.targets: name the compute nodes' exporters" -}}
{{- end -}}
{{- with .Values.networkPolicy -}}
{{- if .enabled -}}
{{- if not (or $.Values.cloudnativepg.enabled .database.cidrs) -}}
{{- fail "networkPolicy.database.cidrs: say where PostgreSQL is, or no pod reaches it" -}}
{{- end -}}
{{- if and $url (not (hasPrefix "unix:" $url)) (not .slurmrestd.cidrs) -}}
{{- fail "networkPolicy.slurmrestd.cidrs: say where slurmrestd is, or the control plane does not reach it" -}}
{{- end -}}
{{- range $setting := list "CONTROLPLANE_GRAFANA__URL" "CONTROLPLANE_ALERTMANAGER__URL" -}}
{{- if and (index $settings $setting) (not $.Values.networkPolicy.extraEgress) -}}
{{- fail (printf "networkPolicy.extraEgress: let the control plane out to settings.%s, or no alert is pulled" $setting) -}}
{{- end -}}
{{- end -}}
{{- range $.Values.replicaSets -}}
{{- if and .endpoints (not $.Values.networkPolicy.extraEgress) -}}
{{- fail (printf "networkPolicy.extraEgress: let pods out to the endpoints of replica set %s, or nobody reaches them" .name) -}}
{{- end -}}
{{- end -}}
{{- if and $url (not .computeNodes.cidrs) -}}
{{- fail "networkPolicy.computeNodes.cidrs: say where the compute nodes are, or nobody reaches a replica" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
