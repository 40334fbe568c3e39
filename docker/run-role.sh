#!/bin/sh
# run-role.sh ROLE: `python -m bot ROLE` in a container that is started again whenever it ends.
#
# A refusal (exit codes 66, 69, 77 and 78, see bot/refusal.py) needs a person's hand, and starting again at once would do
# harm: Discord takes a token away after 1000 connections in a day. So it is said, and the container waits before it
# ends, which makes at most 288 starts a day. Any other end is followed by a new start at once.
PAUSE=300

stop() {
  stopped=yes
  kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

finish() { # its exit code; a signal to this shell ends `wait` early, so it is called again until the child has ended
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || return
  done
}

python -m bot "$@" &
child=$!
finish
case $code in
  66 | 69 | 77 | 78)
    if [ -z "$stopped" ]; then
      echo "guppy: trying again in $PAUSE seconds; when it is put right, start this container anew to be quicker" >&2
      refused=$code
      sleep "$PAUSE" &
      child=$!
      finish
      code=$refused
    fi
    ;;
esac
exit "$code"
