#!/bin/sh
# Makes the archive of a commit of before: sh make.sh COMMIT ZERO_STAGE RANKS, with the packages that it needs in $PYTHONPATH.
set -e
commit=$1 stage=$2 ranks=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
git -C "$here" worktree add --quiet --detach "$work/code" "$commit"
export PYTHONPATH="$work/code:$work/code/kernels:$work/code/launch:$PYTHONPATH" OMP_NUM_THREADS=1
mkdir "$work/made"
cd "$work/made"
ecgscale() { ${PYTHON:-python} -m ecgscale.cli "$@"; }

ecgscale simulate shards --patients 12 --records-per-patient 1 --duration-s 5 --rate-hz 100 --records-per-shard 8 \
  --validation-fraction 0.2 --test-fraction 0.3 --workers 1

data="--data.shards=shards --data.segment_s=2 --data.min_record_s=4 --train.global_batch=4 --train.log_every=1"
model="--model.preset=tiny --model.stem_channels=8 --model.width=16 --model.depth=1 --model.heads=2 --model.ffn_width=16
  --model.position_kernel=4 --model.position_groups=2 --model.dropout=0 --model.attention_dropout=0 --model.feature_dropout=0
  --objective.codes=4 --objective.code_width=8 --objective.negatives=4"
train="--train.steps=4 --train.checkpoint_every=2 --train.keep_last=2 --train.validation_recordings=2
  --train.projected_recordings=0 --engine.learning_rate=1e-3 --engine.zero_stage=$stage --engine.whole_below=0"
export MASTER_ADDR=127.0.0.1 MASTER_PORT=29731 WORLD_SIZE="$ranks"
started=
for rank in $(seq 0 $((ranks - 1))); do
  RANK=$rank LOCAL_RANK=$rank ecgscale pretrain $data $model $train --run.dir=run &
  started="$started $!"
done
for process in $started; do wait "$process"; done
unset MASTER_ADDR MASTER_PORT WORLD_SIZE

ecgscale export run export
ecgscale finetune $data --init run --task.kind=singlelabel --task.label=rhythm --task.min_positives=1 --train.steps=2 \
  --run.dir=tuned
ecgscale evaluate tuned --data.shards=shards --out=report.json
${PYTHON:-python} - <<'PY'
import hashlib
import json
from pathlib import Path

import ecgscale
from ecgscale.data.shard_set import ShardSet

shards = ShardSet.open(Path("shards"))
records = [shards.record(row) for row in range(len(shards))]
model = ecgscale.load("export")
embedding = model.embed(records[0].millivolts(), rate_hz=100, leads=records[0].leads).record_embedding
expected = {
    "millivolts_sha256": [hashlib.sha256(record.millivolts().tobytes()).hexdigest() for record in records],
    "embedding": embedding.tolist(),
    "report": json.loads(Path("report.json").read_text()),
}
Path("expected.json").write_text(json.dumps(expected))
PY

# As after a kill behind step 4, before it was saved; the events tell what its losses are.
rm -r run/checkpoints/step-00000004 run/export run/tensorboard tuned/checkpoints tuned/tensorboard */.writer report.json
tar --sort=name --owner=0 --group=0 --mtime=2026-01-01 -cJf "$here/$commit.tar.xz" .
git -C "$here" worktree remove --force "$work/code"
rm -r "$work"
