#!/bin/sh
# Installs what the demo and the tests run for real, from Debian's own archive, if anything of it is missing; with the
# word `benchmarks`, what the benchmarks of the proxy need beside it; with `node`, what OpenAI's JavaScript SDK runs on.
# The packages' daemons are not started, now or at the next boot: the demo and the tests start their own. What was
# installed before is left as it is.
# Takes no time when nothing is missing. Ends with an error, and a sentence, when something cannot be had.
set -eu

packages="slurmctld slurmd slurmrestd munge slurm-client slurm-wlm-jwt-plugin slurm-wlm-basic-plugins postgresql
    prometheus prometheus-alertmanager python3-venv curl procps util-linux"
services="slurmctld slurmd slurmrestd munge postgresql prometheus prometheus-alertmanager"
programs="slurmctld slurmd slurmrestd munged munge scontrol squeue sbatch prometheus promtool prometheus-alertmanager
    amtool python3 setpriv flock curl ps"
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
purpose=demo
case " $* " in
*" benchmarks "*)
    purpose=benchmarks
    packages="nginx haproxy gcc libc6-dev util-linux"
    services="nginx haproxy"
    programs="nginx haproxy cc setpriv taskset"
    ;;
*" node "*)
    purpose=node
    packages="nodejs npm"  # any Node will do, with its npm: for the tests with OpenAI's JavaScript SDK
    services=
    programs="node npm"
    ;;
esac

missing() {
    for name in $programs; do
        command -v "$name" >/dev/null || printf '%s ' "$name"
    done
    [ $purpose != benchmarks ] || [ -e /usr/include/stdio.h ] || printf 'stdio.h '
    [ $purpose = demo ] || return 0
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || printf 'initdb '
    ls /usr/lib/*/slurm-wlm/auth_jwt.so >/dev/null 2>&1 || printf 'auth_jwt.so '
    # another Python than Debian's brings its own venv
    [ ! -x /usr/bin/python3 ] || /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || printf 'python3-venv '
}

# --- the part that needs root -------------------------------------------------------------------------------

install() {
    policy=/usr/sbin/policy-rc.d
    createcluster=/etc/postgresql-common/createcluster.d/controlplane-demo.conf
    made=
    trap '[ -z "$made" ] || rm -f $made' EXIT
    trap 'exit 1' HUP INT TERM
    if [ ! -e "$policy" ]; then
        made="$made $policy"
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    if ! ls /etc/postgresql/*/main >/dev/null 2>&1; then
        # no default cluster: nobody would start it
        mkdir -p "${createcluster%/*}"
        made="$made $createcluster"
        echo 'create_main_cluster = false' >"$createcluster"
    fi
    fresh=
    for service in $services; do  # each is named like its package
        dpkg-query --show --showformat '${Status}' "$service" 2>/dev/null | grep -q 'ok installed' || fresh="$fresh $service"
    done
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 - a list of words
    apt-get install -y --no-install-recommends $packages >/dev/null 2>&1 || {
        apt-get update
        apt-get install -y --no-install-recommends $packages
    }
    [ -z "$fresh" ] || ! command -v systemctl >/dev/null || systemctl disable $fresh >/dev/null 2>&1
}

if [ "${1:-}" = install-as-root ]; then
    install
    exit 0
fi

lacking=$(missing)
[ -n "$lacking" ] || exit 0
wanted=$(echo $packages)
command -v apt-get >/dev/null || {
    echo "Missing: $lacking- and this is no Debian. Install what Debian calls: $wanted" >&2
    exit 1
}
echo "Missing: $lacking- installing Debian's packages ..."
if [ "$(id -u)" = 0 ]; then
    "$0" install-as-root "$@"
elif sudo -n true 2>/dev/null; then
    sudo -n "$0" install-as-root "$@"
else
    echo "This needs root. Run: sudo $0 $*" >&2
    exit 1
fi
lacking=$(missing)
[ -z "$lacking" ] || {
    echo "Still missing after the installation: $lacking" >&2
    exit 1
}
