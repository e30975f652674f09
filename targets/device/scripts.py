"""The shell scripts that devices run. They keep to POSIX and to what busybox has.

A login shell passes them on to `sh` in single quotes, so that they hold no backslash and no exclamation mark, which not
all shells leave alone there.
"""

from __future__ import annotations

import shlex

BEGIN, RESULTS, FACT = "onnxcomp-begin", "onnxcomp-results", "onnxcomp-fact"
NO_FOLDER, NOT_UNPACKED, WRONG_ARCH, NO_SPACE, TIMED_OUT, ABANDONED, ENDED = 70, 71, 72, 73, 74, 75, 76

JOB = """
want=$1 bytes=$2 need=$3 transfer=$4 limit=$5 folder=$6
umask 077
exec 3<&0 </dev/null
case $(uname -m) in arm64) arch=aarch64 ;; amd64) arch=x86_64 ;; armv8l) arch=armv7l ;; *) arch=$(uname -m) ;; esac
[ -z "$want" ] || [ "$want" = "$arch" ] || { echo "$arch" >&2; exit 72; }
[ -n "$folder" ] || folder=${TMPDIR:-/tmp}
d= job= timer= watcher=
setsid=$(command -v setsid)
end() { kill -s KILL -- "-$1" || kill -s KILL "$1"; } 2>/dev/null
clean() {
  trap "" HUP INT TERM ALRM PIPE
  [ -z "$timer" ] || end "$timer"
  [ -z "$watcher" ] || end "$watcher"
  [ -z "$job" ] || { end "$job"; wait "$job"; }
  cd /
  [ -z "$d" ] || rm -rf "$d"
} 2>/dev/null
tell='
  end() { kill -s KILL -- "-$1" || kill -s KILL "$1"; }
  kill -s "$1" "$2" && sleep 5
  kill -s KILL "$2"
  read -r job timer <"$3/pid" && end "$job"
  rm -rf "$3"
  [ -z "$timer" ] || end "$timer"'
after() { $setsid sh -c "sleep $1; $tell" timer ALRM $$ "$d" >/dev/null 2>&1 3<&- & timer=$!; }
trap clean EXIT
trap "exit 74" ALRM
trap "exit 75" HUP PIPE
trap "exit 76" INT TERM
d=$(mktemp -d "$folder/onnxcomp.XXXXXX") || { d=; exit 70; }
echo "onnxcomp-begin $d"
left() { df -Pk "$d" | { read -r _; read -r _ _ _ k _; echo "$k"; }; }
free=$(left)
[ "${free:-$need}" -ge "$need" ] || { echo "$free" >&2; exit 73; }
after "$transfer"
head -c "$bytes" <&3 | tar xf - -C "$d" & job=$!
wait "$job" || { job=; left >&2; exit 71; }
job=
end "$timer"
after "$limit"
$setsid sh -c "cat <&3 >/dev/null; $tell" watcher HUP $$ "$d" >/dev/null 2>&1 & watcher=$!
cd "$d"
$setsid sh job.sh >/dev/null 3<&- & job=$!
echo "$job $timer" >pid
wait "$job"
code=$?
end "$job"
end "$timer"
job= timer=
echo
echo "onnxcomp-results $code"
tar cf - out 2>/dev/null
"""
"""Makes a folder, unpacks the job that comes on stdin, runs it, and gives back its outputs on stdout.

The folder goes in every case: at the end, when time is up, and when nobody is at the other end of stdin any more. Two
watchers, one of the time and one of stdin, tell this shell, and remove the folder themselves if that does not help.
They lead groups of processes and are killed, not asked to end: a shell that was just started loses other signals.
"""

FACTS = """
folder=$1 python=$2
[ -n "$folder" ] || folder=${TMPDIR:-/tmp}
f() { echo "onnxcomp-fact $*"; }
f arch "$(uname -m)"
f folder "$folder"
f cores "$(getconf _NPROCESSORS_ONLN || nproc)"
while read -r k v _; do
  case $k in MemTotal:) f memory "$v" ;; MemAvailable:) f available "$v" ;; esac
done </proc/meminfo
df -Pk "$folder" | { read -r _; read -r _ _ _ k _; f free "$k"; }
[ -w "$folder" ] && f writable yes
f model "$(tr -d "[:cntrl:]" </proc/device-tree/model || sed -n "/^model name/{s/.*: //p;q;}" /proc/cpuinfo)"
f governor "$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor)"
f temperature "$(cat /sys/class/thermal/thermal_zone*/temp | sort -n | tail -n 1)"
for c in tar mktemp head; do command -v $c >/dev/null || f missing $c; done
f python "$("$python" -c "import platform; print(platform.python_version())")"
f onnxruntime "$("$python" -c "import numpy, onnxruntime; print(onnxruntime.__version__)")"
exit 0
"""
"""Prints what the device is, a fact a line."""


def command(script: str, *arguments: str | int) -> str:
    """What a login shell on the device is given to run a script with arguments."""
    return shlex.join(["exec", "sh", "-c", script, "onnxcomp", *map(str, arguments)])
