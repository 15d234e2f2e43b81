python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site
T0=$(date +%s)
t() { echo "== $1 at $(( $(date +%s) - T0 )) s"; }
t sana; timeout 400 python3 -m experiments.efficiency.run --model=sana --repeat=3 "--forms=naive;low precision" --out=$OUT/sana.json 2>&1 | grep -v -i warn | tail -30
t old; (cd .old && timeout 150 python3 - <<P 2>&1 | tail -8
import experiments.efficiency.run as r
real, n = r.stage_times, [0]
def first(b, c, l):
    n[0] += 1
    if n[0] > 1: raise SystemExit
    return real(b, c, l)
r.stage_times = first
r.main(["--model=sana", "--repeat=2", "--out=$OUT/sana_ca36dd1.json"])
P
)
t more; timeout $(( 575 - $(date +%s) + T0 )) python3 -m experiments.efficiency.run --model=sana --repeat=3 --more --out=$OUT/sana.json 2>&1 | tail -12
t end
