#!/bin/sh
# confined.sh UID FOLDER HIDDEN PYTHON COMMAND...: run a command as any container service may: under a user that
# nobody knows, without capabilities, network or home, on a file system that is read-only but for FOLDER/rw/*.
# HIDDEN is a folder that only root may enter and in which the interpreter lies, at PYTHON, or "".
set -eu
uid=$1 folder=$2 hidden=$3 python=$4
shift 4
mount --make-rprivate /
if [ -n "$hidden" ]; then
    mkdir "$folder/python"
    mount --bind "$python" "$folder/python"
    mount -t tmpfs -o mode=755 tmpfs "$hidden"
    mkdir -p "$python"
    mount --bind "$folder/python" "$python"
fi
for writable in "$folder"/rw/*; do
    mount --bind "$writable" "$writable"
done
mount -o remount,bind,ro /
umask 0002
exec setpriv --reuid="$uid" --regid=0 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs \
    env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME -u HF_HOME "$@"
