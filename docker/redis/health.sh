#!/bin/sh
# Exit 0 if Guppy's user can log in and is answered.
set -eu
REDISCLI_AUTH=$(tr -d '\n' <"${SECRETS:-/run/secrets}/guppy_redis_password")
export REDISCLI_AUTH
[ "$(redis-cli --user guppy --no-auth-warning "$@" ping)" = PONG ]
