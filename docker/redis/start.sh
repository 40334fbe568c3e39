#!/bin/sh
# Starts Redis with Guppy's user. The password is the secret `guppy_redis_password`; where there is none, one is made, in
# the folder that the other containers read it from.
set -eu
umask 022
here=$(dirname "$0")
: "${SECRETS:=/run/secrets}"
password=$SECRETS/guppy_redis_password
if [ ! -s "$password" ]; then
  head -c 32 /dev/urandom | sha256sum | cut -c 1-64 | tr -d '\n' >"$password.new"
  mv "$password.new" "$password"
fi
users=$(mktemp)
sed "s/PASSWORD/$(tr -d '\n' <"$password" | sha256sum | cut -c 1-64)/" "$here/users.acl" >"$users"
exec redis-server "$here/redis.conf" --aclfile "$users" "$@"
