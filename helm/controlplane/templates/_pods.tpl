{{/* What every pod has in common. Each takes (dict "root" $ "of" COMPONENT "values" VALUES). */}}

{{/* Settings that a proxy reads, too; all others are the control plane's. */}}
{{- define "controlplane.isShared" -}}
{{- if regexMatch "^CONTROLPLANE_(DATABASE|LOG|PROXY)__" . }}yes{{ end -}}
{{- end -}}

{{- define "controlplane.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  {{- range $key, $value := .root.Values.podSecurityContext }}
  {{- if not (kindIs "invalid" $value) }}
  {{ $key }}: {{ toJson $value }}
  {{- end }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
serviceAccountName: {{ include "controlplane.serviceAccountName" .root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "controlplane.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "controlplane.spread" -}}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "controlplane.selector" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Image, rights, mounts: what is the same in every container. */}}
{{- define "controlplane.container" -}}
image: {{ include "controlplane.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
resources: {{- toYaml .values.resources | nindent 2 }}
{{- end -}}

{{- define "controlplane.mounts" -}}
- {name: secrets, mountPath: {{ include "controlplane.secretDirectory" . }}, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "controlplane.volumes" -}}
{{ include "controlplane.secretVolume" . }}
- {name: tmp, emptyDir: {sizeLimit: 256Mi}}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Job templates of the site's, for who makes scripts and who checks them. */}}
{{- define "controlplane.templateMount" -}}
{{- if .root.Values.jobTemplates }}
- {name: job-templates, mountPath: /etc/controlplane/sbatch, readOnly: true}
{{- end }}
{{- end -}}

{{- define "controlplane.templateVolume" -}}
{{- if .root.Values.jobTemplates }}
- {name: job-templates, configMap: {name: {{ include "controlplane.name" (dict "root" .root "of" "job-templates") }}}}
{{- end }}
{{- end -}}

{{/* How long a pod may take to end, in seconds: it is told to after preStop, and says goodbye after the drain. */}}
{{- define "controlplane.grace" -}}
{{- add .preStop (ceil .drain | int) 15 -}}
{{- end -}}
