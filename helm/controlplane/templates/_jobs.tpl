{{/*
A Job whose name tells what it does: another image or file of sets is another Job, since a Job cannot be changed. What
else changes makes none, because an `apply` ends the bounds that operators set.
No hooks: before an installation there is no Secret, ConfigMap or Cluster yet that a Job could use, and after it
`--wait` and Argo CD wait for pods that wait for the schema. So Jobs come with everything else, and everybody waits for
whom they need: Jobs for PostgreSQL, `apply` and the pods for the schema.
(dict "root" $ "of" "migrate" "spec" TEXT "checksum" TEXT)
*/}}
{{- define "controlplane.job" -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "controlplane.name" . }}-{{ print .spec .checksum | sha256sum | trunc 10 }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels: {{- include "controlplane.labels" . | nindent 4 }}
  {{- with .root.Values.jobs.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  backoffLimit: 20
  template:
    metadata:
      labels: {{- include "controlplane.selector" . | nindent 8 }}
      annotations:
        checksum/input: {{ .checksum | sha256sum }}
    spec:
      restartPolicy: OnFailure
      {{- .spec | nindent 6 }}
{{- end -}}
