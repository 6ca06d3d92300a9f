"""A CNI plug-in that works or fails as its configuration says. Standard library only.

"log": PATH             each call is appended there: verb, variables, configuration
"on": {VERB: BEHAVIOUR}      how to fail in this phase; "while": PATH only while that file exists
"result": {...}         what ADD prints; without it, the prevResult or an empty result
"real": PATH            a real plug-in that does the work; its result is passed on
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    verb = os.environ["CNI_COMMAND"]
    conf: dict[str, Any] = json.loads(sys.stdin.read())
    behaviour = conf.get("on", {}).get(verb, "")
    if "while" in conf and not Path(conf["while"]).exists():
        behaviour = ""
    if "log" in conf:
        variables = {name: value for name, value in os.environ.items() if name.startswith("CNI_")}
        line = json.dumps({"verb": verb, "plugin": sys.argv[1], "variables": variables, "conf": conf})
        with Path(conf["log"]).open("a") as log:
            log.write(line + "\n")
    if behaviour == "kill-daemon-before":
        os.kill(os.getppid(), signal.SIGKILL)
        return 1
    answer = work(verb, conf)
    if behaviour == "kill-daemon-after":
        os.kill(os.getppid(), signal.SIGKILL)
    if behaviour and behaviour != "kill-daemon-after":
        return misbehave(behaviour)
    sys.stdout.write(answer)
    return 0


def work(verb: str, conf: dict[str, Any]) -> str:
    if "real" in conf:
        inner = {name: value for name, value in conf.items() if name not in ("on", "real", "log")}
        inner["type"] = Path(conf["real"]).name
        done = subprocess.run([conf["real"]], input=json.dumps(inner), capture_output=True, text=True)
        if done.returncode:
            sys.stdout.write(done.stdout)
            sys.exit(done.returncode)
        return done.stdout
    if verb != "ADD":
        return ""
    if "inside" in conf:
        netns = f"--net={os.environ['CNI_NETNS']}"
        subprocess.run(["nsenter", netns, "sh", "-ec", conf["inside"]], check=True)
    return json.dumps(conf.get("result") or conf.get("prevResult") or {"cniVersion": conf["cniVersion"]})


def misbehave(behaviour: str) -> int:
    if behaviour in ("fail", "fail-after"):
        sys.stderr.write("a line for the log\n")
        error = {"cniVersion": "1.0.0", "code": 103, "msg": "the fabric is down", "details": "no uplink"}
        print(json.dumps(error))
        return 1
    if behaviour == "hang":
        # with a child in the same pipes, as shell scripts have
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if behaviour == "malformed":
        print("warning: all is fine\n{]")
        return 0
    if behaviour == "malformed-fail":
        print("panic: index out of range")
        return 2
    if behaviour == "flood":
        while True:
            sys.stdout.write("x" * 65536)
    if behaviour == "flood-errors":
        while True:
            sys.stderr.write("x" * 65536)
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "leave-child":
        subprocess.Popen(["sleep", "3"])
        print(json.dumps({"cniVersion": "1.0.0"}))
        return 0
    raise SystemExit(f"unknown behaviour: {behaviour}")


if __name__ == "__main__":
    sys.exit(main())
