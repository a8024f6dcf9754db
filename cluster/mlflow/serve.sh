#!/usr/bin/env bash
# The team's MLflow server: runs in PostgreSQL, a user and password for everybody, artifacts through the server.
# compose.yaml and the Kubernetes manifests run this same script. Every setting is an environment variable; a secret may
# also be a file, named by the variable with _FILE behind it. No secret reaches a command line or a log.
#
#   MLFLOW_BACKEND_STORE_URI         postgresql://USER@HOST:5432/DATABASE, without the password   (required)
#   PGPASSWORD[_FILE]                the database's password, where it asks for one
#   MLFLOW_ARTIFACTS_DESTINATION     a folder, or s3://BUCKET/FOLDER                                (required)
#   AWS_ACCESS_KEY_ID[_FILE], AWS_SECRET_ACCESS_KEY[_FILE], MLFLOW_S3_ENDPOINT_URL                  for s3://
#   MLFLOW_AUTH_ADMIN_PASSWORD[_FILE]      of MLFLOW_AUTH_ADMIN_USERNAME (admin); needed at the first start
#   MLFLOW_FLASK_SERVER_SECRET_KEY[_FILE]  any long random text; the same in every replica          (required)
#   MLFLOW_HOST (127.0.0.1), MLFLOW_PORT (5000), MLFLOW_WORKERS (2)
#   MLFLOW_SERVER_ALLOWED_HOSTS            names that clients call the server by, with the port: mlflow.example.org
#                                          (required unless MLFLOW_HOST is this machine alone)
#   MLFLOW_SERVER_CORS_ALLOWED_ORIGINS     origins that the UI is opened from (https:// and http:// of those names)
#   MLFLOW_DEFAULT_PERMISSION (READ)       what a user may do with what is another's: READ, EDIT, NO_PERMISSIONS ...
#   MLFLOW_PASSWORD_CACHE_SECONDS (60)     for how long a worker takes a password for right once it was checked
#   MLFLOW_SQLALCHEMYSTORE_POOL_SIZE (10), MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW (30)   connections of a worker's store
#   PYTHON (python3)                       one that has `penstock[server]`
set -euo pipefail

die() { echo "serve.sh: $*" >&2; exit 2; }

read_file() { # NAME: takes NAME's value from the file that NAME_FILE names
  local named="$1_FILE"
  local path="${!named:-}"
  [[ -n $path ]] || return 0
  [[ -r $path ]] || die "$named '$path' cannot be read; accepted: a file that holds nothing but $1"
  printf -v "$1" '%s' "$(<"$path")"
  export "${1?}"
}

for secret in PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY \
  AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN; do
  read_file "$secret"
done

for optional in MLFLOW_S3_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION; do
  [[ -n ${!optional:-} ]] || unset "$optional" # set but empty, as compose files leave it, is an error to some of them
done

# ---- what has to be given
database="${MLFLOW_BACKEND_STORE_URI:-}"
case $database in
  postgresql://*:*@* | postgresql+psycopg2://*:*@* | *[?\&]password=*)
    die "MLFLOW_BACKEND_STORE_URI holds a password, which logs and process lists would show: give it in PGPASSWORD or" \
      "PGPASSWORD_FILE, and the URI as postgresql://USER@HOST:5432/DATABASE" ;;
  postgresql://*) database="postgresql+psycopg2://${database#postgresql://}" ;; # the driver that penstock[server] brings
  postgresql+psycopg2://*) ;;
  *) die "MLFLOW_BACKEND_STORE_URI '$database': accepted is postgresql://USER@HOST:5432/DATABASE" ;;
esac
export MLFLOW_BACKEND_STORE_URI="$database"
[[ -n ${MLFLOW_ARTIFACTS_DESTINATION:-} ]] ||
  die "MLFLOW_ARTIFACTS_DESTINATION is not set; accepted: a folder that outlives the server, or s3://BUCKET/FOLDER"
[[ ${#MLFLOW_FLASK_SERVER_SECRET_KEY} -ge 16 ]] 2>/dev/null ||
  die "MLFLOW_FLASK_SERVER_SECRET_KEY is not set or shorter than 16 characters; make one with: openssl rand -hex 32"
export MLFLOW_FLASK_SERVER_SECRET_KEY

# ---- who may call, and from where
export MLFLOW_HOST="${MLFLOW_HOST:-127.0.0.1}" MLFLOW_PORT="${MLFLOW_PORT:-5000}" MLFLOW_WORKERS="${MLFLOW_WORKERS:-2}"
if [[ -z ${MLFLOW_SERVER_ALLOWED_HOSTS:-} ]]; then
  case $MLFLOW_HOST in
    127.0.0.1 | localhost | ::1) MLFLOW_SERVER_ALLOWED_HOSTS="127.0.0.1:$MLFLOW_PORT,localhost:$MLFLOW_PORT" ;;
    *) die "MLFLOW_HOST is $MLFLOW_HOST, which other machines reach: MLFLOW_SERVER_ALLOWED_HOSTS has to say by what" \
      "names, such as mlflow.example.org,10.0.0.7:$MLFLOW_PORT" ;;
  esac
fi
if [[ -z ${MLFLOW_SERVER_CORS_ALLOWED_ORIGINS:-} ]]; then # the UI's own: its browser sends the origin along
  MLFLOW_SERVER_CORS_ALLOWED_ORIGINS="$(sed -E 's|([^,]+)|https://\1,http://\1|g' <<<"${MLFLOW_SERVER_ALLOWED_HOSTS// /}")"
fi
export MLFLOW_SERVER_ALLOWED_HOSTS MLFLOW_SERVER_CORS_ALLOWED_ORIGINS

# ---- how many connections; 40 requests run at once in a worker, and each waits for one
export MLFLOW_SQLALCHEMYSTORE_POOL_SIZE="${MLFLOW_SQLALCHEMYSTORE_POOL_SIZE:-10}"
export MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW="${MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW:-30}"
for name in MLFLOW_WORKERS MLFLOW_SQLALCHEMYSTORE_POOL_SIZE MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] ||
    die "$name '${!name}': accepted is a whole number from 1 (MLflow takes a pool's 0 for unset, which means its default)"
done

# ---- quiet, and nothing but tracking
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_AUTH_ADMIN_USERNAME="${MLFLOW_AUTH_ADMIN_USERNAME:-admin}"
unset MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN

python="${PYTHON:-python3}"
umask 077
MLFLOW_AUTH_CONFIG_PATH="$(mktemp "${TMPDIR:-/tmp}/mlflow-auth.XXXXXX")" # names the database, holds no secret
export MLFLOW_AUTH_CONFIG_PATH

# Waits for the database, holds the pools against its connections, looks at the bucket, writes the file of the users.
"$python" - <<'PYTHON'
import configparser
import os
import sys
import time

import sqlalchemy

uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
seconds = int(os.environ.get("MLFLOW_DATABASE_WAIT_SECONDS", "60"))


def fail(message):
    sys.exit(f"serve.sh: {message}")


def limits():
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args={"connect_timeout": 5})
    deadline = time.monotonic() + seconds
    while True:
        try:
            with engine.connect() as connection:
                return dict(connection.execute(sqlalchemy.text(
                    "SELECT name, setting::int FROM pg_settings WHERE name IN "
                    "('max_connections', 'superuser_reserved_connections', 'reserved_connections')"
                )).all())
        except sqlalchemy.exc.OperationalError as error:
            reason = str(error.orig).strip().splitlines()[0]
            refused = any(word in reason for word in ("password", "authentication", "does not exist", "pg_hba"))
            if refused or time.monotonic() > deadline:
                fail(f"MLFLOW_BACKEND_STORE_URI {uri!r}: the database does not answer, or refuses: {reason}"
                     + (" (the password is PGPASSWORD's or PGPASSWORD_FILE's)" if refused else ""))
            time.sleep(0.5)


# Runs, registry and users are a store each, with a pool of its own in every worker; the parent keeps one connection of
# each, and some are left for a backup and for people.
workers, pool, overflow = (int(os.environ[name]) for name in (
    "MLFLOW_WORKERS", "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"))
stores, spare = 3, 5
wanted = stores * (workers * (pool + overflow) + 1) + spare
settings = limits()
free = 2 * settings["max_connections"] - sum(settings.values())
if wanted > free:
    fail(f"{stores} stores x (MLFLOW_WORKERS={workers} x (MLFLOW_SQLALCHEMYSTORE_POOL_SIZE={pool} + "
         f"MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW={overflow}) + 1) + {spare} spare = {wanted} connections, and this PostgreSQL "
         f"has {free} (max_connections {settings['max_connections']}, less those it reserves): raise its max_connections "
         f"to {wanted + settings['max_connections'] - free}, or lower one of the three")

destination = os.environ["MLFLOW_ARTIFACTS_DESTINATION"]
if destination.startswith("s3://"):
    import boto3
    import botocore.exceptions

    try:
        client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None)
        client.head_bucket(Bucket=destination.removeprefix("s3://").split("/")[0])
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        fail(f"MLFLOW_ARTIFACTS_DESTINATION {destination!r} cannot be used: {error}")
elif "://" not in destination:
    try:
        os.makedirs(destination, exist_ok=True)
    except OSError as error:
        fail(f"MLFLOW_ARTIFACTS_DESTINATION {destination!r} cannot be made: {error}")
    if not os.access(destination, os.W_OK):
        fail(f"MLFLOW_ARTIFACTS_DESTINATION {destination!r} cannot be written to by user {os.getuid()}")

config = configparser.ConfigParser(interpolation=None)
config["mlflow"] = {key: value.replace("%", "%%") for key, value in {
    "default_permission": os.environ.get("MLFLOW_DEFAULT_PERMISSION", "READ"),
    "database_uri": uri,
    "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    "auth_cache_ttl_seconds": os.environ.get("MLFLOW_PASSWORD_CACHE_SECONDS", "60"),
}.items()}
with open(os.environ["MLFLOW_AUTH_CONFIG_PATH"], "w") as stream:
    config.write(stream)
PYTHON

"$python" -m mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
exec "$python" -m mlflow server --app-name basic-auth
