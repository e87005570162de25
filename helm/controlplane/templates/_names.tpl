{{/* What objects are named after. No two releases of a namespace have the same, however they are named. */}}
{{- define "controlplane.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = ternary "controlplane" (printf "%s-controlplane" .Release.Name) (eq .Release.Name "controlplane") -}}
{{- end -}}
{{- /* Services begin with a letter and have no dots, as releases may; their names and labels end at 63 characters, and
parts are added to this one. */ -}}
{{- if or (gt (len $name) 38) (not (regexMatch "^[a-z][-a-z0-9]*$" $name)) -}}
{{- $plain := regexReplaceAll "^([0-9])" ($name | replace "." "-") "r${1}" -}}
{{- $name = printf "%s-%s" ($plain | trunc 29 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* (dict "root" $ "of" "proxy"): the name of one part. */}}
{{- define "controlplane.name" -}}
{{ include "controlplane.fullname" .root }}-{{ .of }}
{{- end -}}

{{- define "controlplane.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "controlplane.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* What never changes, and so may select. */}}
{{- define "controlplane.selector" -}}
app.kubernetes.io/name: controlplane
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .of }}
{{- end -}}

{{/* Of pods: without the chart's version, which restarts nothing. */}}
{{- define "controlplane.podLabels" -}}
{{ include "controlplane.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end -}}

{{- define "controlplane.labels" -}}
{{ include "controlplane.podLabels" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end -}}

{{- define "controlplane.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}
