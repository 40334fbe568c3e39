#!/usr/bin/env bash
# Shows on this machine's Docker that what the compose file promises holds: builds the images, brings everything up
# with the platforms' stand-ins in Discord's and Telegram's place, and tries it. One line for each thing that was seen;
# exit code 0 if all of them hold. Takes a few minutes and the project name "guppy-proof", and leaves nothing behind.
#
#   docker/prove.sh [--no-build]
set -uo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
discord_token=a-token.of-the.stand-in
telegram_token=123456789:stand-in_TOKEN-of-35-characters-abcd
printf 'GUPPY_DISCORD_TOKEN=%s\nGUPPY_TELEGRAM_TOKEN=%s\n' "$discord_token" "$telegram_token" >"$work/env"
export COMPOSE_PROJECT_NAME=guppy-proof COMPOSE_FILE=docker-compose.yml:docker/prove/compose.yml
export COMPOSE_ENV_FILES=$work/env COMPOSE_PROGRESS=quiet TAG=proof
images="guppy-redis guppy-bot guppy-worker"
failed=0

saw() { # saw WHAT FIGURES CONDITION...: one line of the proof
  local what=$1 figures=$2 verdict=holds
  shift 2
  "$@" || { verdict=FAILS failed=1; }
  printf '%-6s %-66s %s\n' "$verdict" "$what" "$figures"
}
dc() { docker compose "$@"; }
of() { dc ps -q "$1" | head -1; }
ask() { dc exec -T platforms python -m tests.docker.platforms ask "$@"; }
begin() { # begin PLATFORM PEOPLE: so many ask at once, in the background; back when they have
  ask "$1" --people "$2" >"$work/load" 2>&1 &
  for _ in $(seq 300); do grep -q said "$work/load" && return; sleep 0.1; done
}
field() { tail -1 <<<"$2" | sed -E "s/.*\"$1\": ([0-9]+).*/\1/"; }
counts() { echo "$(field answered "$1") of $(field asked "$1") answered, $(field lines "$1") told why not, $(field silent "$1") silent, $(field doubled "$1") doubled"; }
all_once() { [ "$(field answered "$1")" = "$(field asked "$1")" ] && [ "$(field doubled "$1")" = 0 ]; }
none_lost() { [ "$(field silent "$1")" = 0 ] && [ "$(field doubled "$1")" = 0 ]; }
none_doubled() { [ "$(field doubled "$1")" = 0 ]; }
healthy() { # healthy SERVICE...: within a minute
  local service
  for service in "$@"; do
    for _ in $(seq 60); do
      [ "$(docker inspect -f '{{.State.Health.Status}}' "$(of "$service")")" = healthy ] && continue 2
      sleep 1
    done
    return 1
  done
}
crash() { # crash CONTAINER COMMAND: SIGKILL the process in it that was started so, as the kernel would
  docker exec "$1" sh -c 'for p in /proc/[0-9]*; do
    tr "\0" " " <"$p/cmdline" 2>/dev/null | grep -q "^$0" && kill -9 "${p#/proc/}"; done; true' "$2"
}
megabytes() { echo $(($(docker inspect -f '{{.Size}}' "$1") / 1000000)); }
finish() {
  dc down -v --remove-orphans --timeout 15 >/dev/null 2>&1
  rm -rf "$work"
}
trap finish EXIT

echo "Docker $(docker version -f '{{.Server.Version}}'), compose $(docker compose version --short)"

# --- images
if [ "${1:-}" != --no-build ]; then
  dc build >"$work/build.log" 2>&1 || { tail -30 "$work/build.log"; exit 1; }
fi
base=$(megabytes "${PYTHON:-python:3.11-slim-bookworm}")
for image in guppy-bot:200 guppy-worker:1200; do
  name=${image%:*} most=${image#*:}
  own=$(($(megabytes "$name:$TAG") - base))
  # A stand-in for the base is of another size than the real one (125 MB), so that is what is counted.
  saw "$name is smaller than $most MB" "$own MB and 125 MB of base" [ $((own + 125)) -lt "$most" ]
done
saw "no torch in the adapters' image" "" \
  [ "$(docker run --rm guppy-bot:$TAG python -c 'import importlib.util as u; print(u.find_spec("torch"))')" = None ]
for image in $images; do
  { docker history --no-trunc "$image:$TAG"; docker inspect "$image:$TAG"; } >>"$work/about-images"
done
for image in $images; do docker inspect -f '{{.Config.User}}' "$image:$TAG"; done >"$work/users"
saw "every image has a user of its own, not root" "$(paste -sd' ' "$work/users")" [ "$(grep -cE '^[1-9]' "$work/users")" = 3 ]

# --- up
begun=$SECONDS
dc up -d --wait --wait-timeout 180 >"$work/up.log" 2>&1
saw "docker compose up --wait" "$((SECONDS - begun)) s" [ $? = 0 ]
dc ps -a >"$work/ps"
saw "nothing is published" "" [ -z "$(docker ps -q --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" --filter publish=1-65535)" ]
for platform in discord telegram; do
  answer=$(ask $platform)
  saw "a message on $platform is answered" "$(counts "$answer")" all_once "$answer"
done
saw "run --rm worker guppy chat" "" [ -n "$(dc run --rm -T worker guppy chat -p 'are you hungry' 2>/dev/null)" ]

# --- the containers' own limits
for service in redis worker discord telegram; do
  id=$(of $service)
  status=$(docker exec "$id" grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs):' /proc/1/status | tr -s '\t\n' ' ')
  saw "$service: no root, no capability, no way to new privileges" "$(docker exec "$id" id -u)" \
    grep -qE '^Uid: [1-9][0-9]* .*CapEff: 0{16} CapBnd: 0{16} NoNewPrivs: 1' <<<"$status"
  docker exec "$id" sh -c 'touch /app/x || touch /x' >/dev/null 2>&1
  saw "$service: cannot write its own files" "" [ $? != 0 ]
done
docker exec "$(of telegram)" python -c 'b"x" * (1 << 30)' >/dev/null 2>&1
code=$?
saw "telegram: the memory limit holds" "1 GB asked for: exit code $code" [ $code = 137 ]
docker exec "$(of worker)" python -c 'import socket; socket.create_connection(("1.1.1.1", 443), 3)' >/dev/null 2>&1
saw "worker: no way to the internet" "" [ $? != 0 ]
healthy telegram worker
docker exec "$(of redis)" redis-cli ping >"$work/noauth" 2>&1
saw "redis: nobody without the password" "$(cat "$work/noauth")" grep -q NOAUTH "$work/noauth"
as_guppy='REDISCLI_AUTH=$(cat /run/secrets/guppy_redis_password) redis-cli --no-auth-warning --user guppy'
docker exec "$(of redis)" sh -c "$as_guppy config get save; $as_guppy keys '*'; $as_guppy get other; $as_guppy flushall" >"$work/acl" 2>&1
saw "redis: Guppy's user may do nothing else" "$(grep -c NOPERM "$work/acl") of 4 refused" [ "$(grep -c NOPERM "$work/acl")" = 4 ]

# --- load, and what may happen
begin discord 20
dc up -d --wait --wait-timeout 180 --scale worker=4 worker >/dev/null 2>&1
saw "--scale worker=4 under load" "$(dc ps -q worker | wc -l) workers" [ "$(dc ps -q worker | wc -l)" = 4 ]
wait $!
saw "  the questions of that time" "$(counts "$(cat "$work/load")")" all_once "$(cat "$work/load")"

begin telegram 20
crash "$(of worker)" "python -m bot"
wait $!
saw "a worker is killed (SIGKILL) in its work" "$(counts "$(cat "$work/load")")" all_once "$(cat "$work/load")"
saw "  and comes back by itself" "" healthy worker

begin discord 20
crash "$(of redis)" redis-server
wait $!
saw "Redis is killed, and comes back empty" "$(counts "$(cat "$work/load")")" none_lost "$(cat "$work/load")"
saw "  and all are well" "" healthy redis worker discord telegram

for platform in telegram discord; do
  begin $platform 10
  crash "$(of $platform)" "python -m bot"
  wait $!
  # What it had in hand is lost with it: who asked stands in its memory alone. Nothing is said twice.
  saw "the $platform adapter is killed (SIGKILL) in its work" "$(counts "$(cat "$work/load")")" none_doubled "$(cat "$work/load")"
  saw "  and comes back by itself" "" healthy $platform
  answer=$(ask $platform)
  saw "  and answers" "$(counts "$answer")" all_once "$answer"
done

# --- another version, and the end
for image in $images; do docker tag "$image:$TAG" "$image:next"; done
dc up -d --wait --wait-timeout 180 --scale worker=1 worker >/dev/null 2>&1
old=$(of worker)
begin discord 10
TAG=next dc up -d --wait --wait-timeout 180 --no-recreate --scale worker=2 worker >/dev/null 2>&1
docker stop --time 15 "$old" >/dev/null
docker rm "$old" >/dev/null
wait $!
saw "a new worker takes the old one's place under load" "$(counts "$(cat "$work/load")")" all_once "$(cat "$work/load")"
answer=$(ask telegram)
saw "  old adapters and the new worker share the queue" "$(counts "$answer")" all_once "$answer"
TAG=next dc up -d --wait --wait-timeout 180 >/dev/null 2>&1
answer=$(ask telegram)
saw "  then new adapters and a new Redis" "$(counts "$answer")" all_once "$answer"

begin discord 5
begun=$SECONDS
ids=$(dc ps -q worker discord telegram)
dc stop discord telegram worker >/dev/null 2>&1
took=$((SECONDS - begun))
wait $!
saw "stopping drains" "$took s, $(counts "$(cat "$work/load")")" none_lost "$(cat "$work/load")"
codes=$(docker inspect -f '{{.State.ExitCode}}' $ids | sort -u | paste -sd' ')
saw "  with exit code 0 within 15 s" "exit codes: $codes" [ "$codes" = 0 -a "$took" -le 15 ]

# --- secrets
dc logs --no-color >"$work/logs" 2>&1
password=$(docker exec "$(of redis)" cat /run/secrets/guppy_redis_password)
dc ps -q | xargs docker inspect >"$work/about-containers"
saw "no token in an image's layers or labels" "" bash -c "! grep -qF -e '$discord_token' -e '$telegram_token' '$work/about-images'"
saw "no token and no password in the logs" "$(wc -l <"$work/logs") lines" \
  bash -c "! grep -qF -e '$discord_token' -e '$telegram_token' -e '$password' '$work/logs'"
saw "no password in docker inspect" "" bash -c "[ -n '$password' ] && ! grep -qF '$password' '$work/about-containers'"
saw "no word of what people wrote in the logs" "" bash -c "! grep -qF 'are you hungry' '$work/logs'"

dc down -v --remove-orphans >/dev/null 2>&1
left=$(docker ps -aq --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" | wc -l)
saw "docker compose down leaves nothing" "$left containers" [ "$left" = 0 ]
exit $failed
