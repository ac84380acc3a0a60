#!/bin/sh
# The servers that some tests run for themselves: Debian's packages, installed when they are missing and we may.
set -eu
missing=""
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v promtool >/dev/null || missing="$missing prometheus"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing for the tests:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # Installed services must not start by themselves.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get -qq update
    # shellcheck disable=SC2086  # a list
    apt-get -qq install --no-install-recommends -y $missing >/dev/null
else
    echo "not installed, and the tests that need them are skipped:$missing"
fi
