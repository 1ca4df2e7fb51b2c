"""What stands in for apptainer: it takes the same arguments and variables, and no image.

It notes what it is given, and ends as the volume's `plan` tells it, one word for each start: a code; `KILL` or
`TERM`, by that signal; `wait`, with 75 when it is asked to stop; `deaf`, not even then. Without a plan it runs
the stages that lie here, with the paths of the binds for those in the image, in the environment that
`--containall` leaves, where the nodes' names are known.
"""

PROGRAM = """\
#!{python}
import json, os, signal, subprocess, sys, time
assert sys.argv[1] == "run"
binds = dict(pair.split(":")[::-1] for pair in sys.argv[sys.argv.index("--bind") + 1].split(","))
volume = binds["/runs"]
assert os.path.isdir(binds["/cache"])

def note(what):
    with open(volume + "/calls.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")

def told(number, frame):
    note({{"told": number}})
    if plan[0] == "wait":
        sys.exit(75)

if os.path.exists(volume + "/plan"):
    plan = open(volume + "/plan").read().split()
    open(volume + "/plan", "w").write(" ".join(plan[1:]))
    note({{"arguments": sys.argv[1:], "environment": dict(os.environ)}})
    if plan[0] in ("wait", "deaf"):
        signal.signal(signal.SIGTERM, told)
        open(volume + "/waiting", "w").close()
        until = time.monotonic() + 300
        while time.monotonic() < until:
            time.sleep(1)
    if not plan[0].isdigit():
        os.kill(os.getpid(), getattr(signal, "SIG" + plan[0]))
    sys.exit(int(plan[0]))

kept = {{name: os.environ[name] for name in ("PATH", "HOME", "STAND_IN_ROOT")}}
prefix = "APPTAINERENV_"
given = {{n[len(prefix):]: v for n, v in os.environ.items() if n.startswith(prefix)}}
for here, there in binds.items():
    given = {{n: there + v[len(here):] if (v + "/").startswith(here + "/") else v for n, v in given.items()}}
given |= {{"EXPECT_GPU": "0", "PYTHONPATH": kept["STAND_IN_ROOT"], "OMP_NUM_THREADS": "1"}}
names = [given[n] for n in ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST")]
with open(volume + "/nodes.jsonl", "a") as file:
    file.write(json.dumps(names) + "\\n")
arguments = sys.argv[[a.startswith("docker://") for a in sys.argv].index(True) + 1:]
os.chdir(kept["STAND_IN_ROOT"])
known = 'mount --bind "$0" /etc/hosts; exec "$@"'
words = ["unshare", "--mount", "sh", "-ec", known, "{hosts}", sys.executable, "-m", "stages", *arguments]
os.execvpe(words[0], words, kept | given)
"""
