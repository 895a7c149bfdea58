{{/* Names and labels. */}}
{{- define "kvmesh.name" -}}
{{- printf "%s-kvmesh" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "kvmesh.selector" -}}
app.kubernetes.io/name: kvmesh
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvmesh.labels" -}}
{{ include "kvmesh.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* image: light or engine. Call with (list $ "light"). */}}
{{- define "kvmesh.image" -}}
{{- $root := index . 0 -}}
{{- $image := printf "kvmesh-%s:%s" (index . 1) (default $root.Chart.AppVersion $root.Values.image.tag) -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ $image }}
{{- end }}

{{- define "kvmesh.redisUrl" -}}
{{- default (printf "redis://%s-redis:6379/0" (include "kvmesh.name" .)) .Values.redis.url -}}
{{- end }}

{{/* Of every pod. */}}
{{- define "kvmesh.pod" -}}
serviceAccountName: {{ include "kvmesh.name" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add .Values.drainGrace 10 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "kvmesh.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Ports and probes of a service: gRPC's standard health service. A model may take minutes to load. */}}
{{- define "kvmesh.serving" -}}
ports:
  - {name: grpc, containerPort: 50051}
  - {name: metrics, containerPort: {{ .Values.metrics.port }}}
startupProbe:
  grpc: {port: 50051}
  periodSeconds: 5
  failureThreshold: 120
readinessProbe:
  grpc: {port: 50051}
  periodSeconds: 5
livenessProbe:
  grpc: {port: 50051}
  periodSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* The environment that differs from pod to pod; the rest is in the ConfigMap. Call with (dict "settings" …). */}}
{{- define "kvmesh.environment" -}}
- name: KVMESH_ADVERTISE
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: KVMESH_WORKER_ID
  {{- if .workerId }}
  value: {{ .workerId | quote }}
  {{- else }}
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- end }}
{{- range $name, $value := .settings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "kvmesh.annotations" -}}
checksum/config: {{ include (print $.Template.BasePath "/configmap.yaml") . | sha256sum }}
prometheus.io/scrape: "true"
prometheus.io/port: {{ .Values.metrics.port | quote }}
{{- end }}

{{/* Fetches the model before the service starts; what is there already is kept. */}}
{{- define "kvmesh.pull" -}}
- name: model
  image: {{ include "kvmesh.image" (list . "engine") }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [kvmesh, models, pull, {{ .Values.model | quote }}]
  securityContext: {{ include "kvmesh.securityContext" . | nindent 4 }}
  resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {memory: 4Gi}}
  volumeMounts:
    - {name: models, mountPath: /var/cache/kvmesh}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "kvmesh.volumes" -}}
- name: tmp
  emptyDir: {}
- name: models
  {{- if .Values.modelCache.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.modelCache.existingClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.modelCache.size }}}
  {{- end }}
{{- end }}
