#!/usr/bin/env bash
# Cloud TPU: one TPU VM, a slice of a pod, or several slices; the same command runs on every worker.
#
#   BUCKET=gs://my-bucket NAME=sora ZONE=us-west4-a TYPE=v5litepod-16 experiments/launch/tpu.sh create
#   ... tpu.sh install     this folder, a Python and the packages on every worker
#   ... tpu.sh train       starts the run in the background, or goes on with it
#   ... tpu.sh log         what the first worker says
#   ... tpu.sh stop        SIGTERM: all workers save the same step and end
#   ... tpu.sh delete
#
# TYPE counts as Google sells them: v5litepod-16 is v5e:4x4 of `sora-jax plan`, v6e-256 is v6e:16x16, v5p-128 is v5p:4x4x4
# (cores, two to a chip). SLICES=2 asks for two slices by a queued resource, and `create` waits until they are there. SPOT=1
# asks for machines that may be taken back: then `delete`, `create`, `install` and `train`, and the run goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${NAME:=sora}" "${ZONE:=us-west4-a}" "${TYPE:=v5litepod-16}" "${SLICES:=1}" "${CONFIG:=configs/sora.py:b}"
: "${BUCKET:?set BUCKET to gs://... : data and runs must be where every worker reads and writes}"
: "${WORKDIR:=$BUCKET/runs/$NAME}" "${LATENTS:=$BUCKET/data/latents}" "${ARGUMENTS:=}" "${CODE:=$BUCKET/code/$NAME.tar.gz}"
case $TYPE in
  v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
  *) : "${RUNTIME:?set RUNTIME to the TPU software version of $TYPE}" ;;
esac
spot=()
if [[ ${SPOT:-} ]]; then spot=(--spot); fi

everywhere() { # everywhere COMMAND: on all workers at once, of all slices
  if ((SLICES > 1)); then
    gcloud alpha compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=all --worker=all --command="$1"
  else
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
  fi
}

first() { # first COMMAND: on the worker that writes
  local vm=$NAME
  if ((SLICES > 1)); then vm=$NAME-0; fi
  gcloud compute tpus tpu-vm ssh "$vm" --zone="$ZONE" --worker=0 --command="$1"
}

case ${1:-} in
  create)
    if ((SLICES > 1)); then
      gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --node-count="$SLICES" --node-prefix="$NAME" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
      until [[ $(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)") == ACTIVE ]]; do
        sleep 30
      done
    else
      gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$RUNTIME" "${spot[@]}"
    fi
    ;;
  install)
    # Through the bucket: one copy up, then every worker takes it. The image's own Python is older than 3.11.
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -cz | gcloud storage cp - "$CODE"
    everywhere "set -e; mkdir -p sora_jax && cd sora_jax
      gcloud storage cp $CODE - | tar -xz
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --clear --python 3.12 .venv
      ~/.local/bin/uv pip install --python .venv/bin/python -e '.[tpu,gcs]'"
    ;;
  train)
    line=".venv/bin/sora-jax train --distributed --config=$CONFIG --workdir=$WORKDIR --config.latents=$LATENTS $ARGUMENTS"
    everywhere "cd sora_jax && { nohup $line > train.log 2>&1 < /dev/null & }"
    ;;
  log) first "tail -n 40 -f sora_jax/train.log" ;;
  stop) everywhere "pkill -TERM -f '[s]ora-jax train' || true" ;;
  delete)
    if ((SLICES > 1)); then
      gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
    else
      gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    fi
    ;;
  *)
    sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
