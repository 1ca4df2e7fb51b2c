#!/bin/sh
# lora-stages-llama2-7b: run it on the machine itself, as with `nohup sh job.sh &`. TERM ends it with the state safe.
export RUN_DIR=/runs/llama2-7b
export SCRATCH_DIR=/cache
export EXPECT_GPU=1
export HF_HOME=/runs/cache/huggingface
export NUM_GPUS=1
export GRACE_SECONDS=25

mkdir -p /data/runs
stopped=
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' TERM INT
attempt=1
while :; do
  docker run --rm --init=false \
    --name lora-stages-llama2-7b \
    --gpus 1 \
    --user "$(id -u):0" \
    --read-only --cap-drop=ALL --security-opt no-new-privileges \
    --tmpfs /tmp:exec --shm-size 8g \
    --stop-timeout 30 \
    -v /data/runs:/runs \
    -v /cache \
    --env RUN_DIR \
    --env SCRATCH_DIR \
    --env EXPECT_GPU \
    --env HF_HOME \
    --env NUM_GPUS \
    --env GRACE_SECONDS \
    --env HF_TOKEN \
    --env AWS_ACCESS_KEY_ID \
    --env AWS_SECRET_ACCESS_KEY \
    --env AWS_SESSION_TOKEN \
    --env JUDGE_API_KEY \
    --env WANDB_API_KEY \
    --env MLFLOW_TRACKING_PASSWORD \
    --env MLFLOW_TRACKING_TOKEN \
    --env TRACKIO_WRITE_TOKEN \
    registry.example.com/lora-stages:0.1 \
    --env-file env/llama2-7b.env chain &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  [ -z "$stopped" ] && [ "$attempt" -lt 10 ] || exit "$code"
  case $code in
    75|137|143) attempt=$((attempt + 1)); sleep "${PAUSE:-10}" ;;
    *) exit "$code" ;;
  esac
done
