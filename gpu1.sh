set -x
python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem --format=csv
T0=$(date +%s)
t() { echo "== $1 at $(( $(date +%s) - T0 )) s"; }
t new; timeout 240 python3 -m experiments.full_size --config=flux:sol_rl --prompts=1 --repeat=5 --only=encode,forward --forward=bf16:24,fp8:24 --out=$OUT/forward_new.json 2>&1 | grep -v warn | tail -8
t old; (cd .old && timeout 200 python3 -m experiments.full_size --config=flux --prompts=1 --repeat=5 --only=encode,forward --forward=bf16:24,fp8:24 --out=$OUT/forward_old.json 2>&1 | tail -8)
t learn; timeout 300 python3 -m experiments.full_size --config=flux:sol_rl --prompts=1 --repeat=3 --only=encode,forward,learn --forward=fp8:24 --every=1,4 --out=$OUT/learn.json 2>&1 | tail -8
t speed; timeout 150 python3 -m experiments.rewards.speed --sizes=512 --kinds=float32_exact,float32,bfloat16 --out=$OUT/speed.json 2>&1 | tail -18
t end
