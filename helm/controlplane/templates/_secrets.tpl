{{/*
Secrets: which there are, whose they are, and how they come into a pod: as files of one projected volume, with a
variable that names each. None is ever a variable's value.
*/}}

{{/* "all" or "control-plane": who is given it; its variable, which names the file. */}}
{{- define "controlplane.secretTable" -}}
databaseUrl: {for: all, variable: DATABASE_URL_FILE}
webhookHmacSecrets: {for: control-plane, variable: CONTROLPLANE_WEBHOOK__HMAC_SECRETS_FILE}
webhookBearerTokens: {for: control-plane, variable: CONTROLPLANE_WEBHOOK__BEARER_TOKENS_FILE}
webhookBasicCredentials: {for: control-plane, variable: CONTROLPLANE_WEBHOOK__BASIC_CREDENTIALS_FILE}
operatorTokens: {for: control-plane, variable: CONTROLPLANE_OPERATOR__TOKENS_FILE}
slurmToken: {for: control-plane, variable: CONTROLPLANE_SLURM__TOKEN_FILE}
slurmJwtKey: {for: control-plane, variable: CONTROLPLANE_SLURM__JWT_KEY_FILE}
grafanaToken: {for: control-plane, variable: CONTROLPLANE_GRAFANA__TOKEN_FILE}
{{- end -}}

{{- define "controlplane.secretDirectory" -}}/run/secrets/controlplane{{- end -}}

{{/* Of a root: a YAML map of the secrets in use, name: {secret, key, file, variable, for}. */}}
{{- define "controlplane.secretsInUse" -}}
{{- $root := . -}}
{{- $used := dict -}}
{{- range $name, $row := include "controlplane.secretTable" . | fromYaml -}}
{{- $given := index $root.Values.secrets $name -}}
{{- $key := $given.key | default (kebabcase $name) -}}
{{- $secret := $given.existingSecret -}}
{{- if $given.value -}}
{{- $secret = include "controlplane.name" (dict "root" $root "of" "secrets") -}}
{{- $key = kebabcase $name -}}
{{- else if and (eq $name "databaseUrl") (not $secret) -}}
{{- $secret = include "controlplane.name" (dict "root" $root "of" "database") -}}
{{- if $root.Values.cloudnativepg.enabled -}}
{{- $secret = printf "%s-app" $secret -}}
{{- $key = "uri" -}}
{{- end -}}
{{- end -}}
{{- if $secret -}}
{{- $file := kebabcase $name -}}
{{- $_ := set $used $name (dict "secret" $secret "key" $key "file" $file "variable" $row.variable "for" $row.for) -}}
{{- end -}}
{{- end -}}
{{- toYaml $used -}}
{{- end -}}

{{/* (dict "root" $ "of" "proxy"): the variables that name a component's secret files. */}}
{{- define "controlplane.secretVariables" -}}
{{- $of := .of -}}
{{- range include "controlplane.secretsInUse" .root | fromYaml }}
{{- if or (eq .for "all") (eq .for $of) }}
- name: {{ .variable }}
  value: {{ include "controlplane.secretDirectory" $ }}/{{ .file }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The volume with a component's secret files. */}}
{{- define "controlplane.secretVolume" -}}
{{- $of := .of -}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
    {{- range include "controlplane.secretsInUse" .root | fromYaml }}
    {{- if or (eq .for "all") (eq .for $of) }}
      - secret:
          name: {{ .secret | quote }}
          items:
            - {key: {{ .key | quote }}, path: {{ .file }}}
    {{- end }}
    {{- end }}
{{- end -}}
