#!/usr/bin/env bash
# XPK: a GKE cluster of TPU slices, and a run on all of them. pip install xpk; gcloud, kubectl and docker must be there.
#
#   PROJECT=my-project BUCKET=gs://my-bucket IMAGE=REGISTRY/sora_jax experiments/launch/xpk.sh create
#   ... xpk.sh train       ... xpk.sh list       ... xpk.sh stop       ... xpk.sh delete
#
# SLICES=2 TYPE=v5p-256 CONFIG=configs/sora.py:14b is the plan `14b-slices` of experiments/plans. CAPACITY is --on-demand,
# --spot or --reservation=NAME. A worker that is lost, and the others that end for want of it (code 75), restart the whole
# job, which goes on from its last save; a mistake in the command (code 2) ends it.
set -euo pipefail

: "${CLUSTER:=sora}" "${NAME:=sora}" "${ZONE:=us-west4-a}" "${TYPE:=v5litepod-16}" "${SLICES:=1}"
: "${CONFIG:=configs/sora.py:b}" "${ARGUMENTS:=}" "${CAPACITY:=--on-demand}"
: "${PROJECT:?set PROJECT to the Google Cloud project}"
where=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")

case ${1:-} in
  create) xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices="$SLICES" "$CAPACITY" ;;
  train)
    : "${BUCKET:?set BUCKET to gs://...}" "${IMAGE:?set IMAGE to what experiments/launch/Dockerfile made}"
    : "${WORKDIR:=$BUCKET/runs/$NAME}" "${LATENTS:=$BUCKET/data/latents}"
    xpk workload create "${where[@]}" --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" \
      --docker-image="$IMAGE" --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
      --command="sora-jax train --distributed --config=$CONFIG --workdir=$WORKDIR --config.latents=$LATENTS $ARGUMENTS"
    ;;
  list) xpk workload list "${where[@]}" ;;
  stop) xpk workload delete "${where[@]}" --workload="$NAME" ;;
  delete) xpk cluster delete "${where[@]}" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
