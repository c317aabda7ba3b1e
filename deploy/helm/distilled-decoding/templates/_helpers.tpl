{{- define "dd.selector" -}}
app.kubernetes.io/name: {{ .Values.name }}
{{- end }}

{{- define "dd.labels" -}}
{{ include "dd.selector" . }}
app.kubernetes.io/part-of: distilled-decoding
{{- end }}

{{- define "dd.rights" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{- /* An init container of the model's volume: its name, and the command of dd-server. */}}
{{- define "dd.prepare" -}}
- name: {{ .name }}
  image: {{ .root.Values.image.repository }}:{{ .root.Values.image.tag }}
  imagePullPolicy: IfNotPresent
  # A volume that is filled already needs no hub.
  command: [sh, -c, 'test -e "$DD_HOME/models/$DD_SERVER_MODEL/manifest.json" || dd-server {{ .command }} "$DD_SERVER_MODEL"']
  env:
    - name: DD_SERVER_MODEL
      value: {{ .root.Values.model | quote }}
    - name: DD_HOME
      value: /models/dd
    - name: HF_HOME
      value: /models/hub
    - name: HF_TOKEN_PATH
      value: /etc/dd-server/hub/token
  resources:
    requests:
      cpu: "1"
      memory: {{ .root.Values.modelCache.memory }}
    limits:
      memory: {{ .root.Values.modelCache.memoryLimit }}
  securityContext:
    {{- include "dd.rights" .root | nindent 4 }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: models
      mountPath: /models
    - name: hub
      mountPath: /etc/dd-server/hub
      readOnly: true
{{- end }}
