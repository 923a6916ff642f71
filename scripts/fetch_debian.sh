#!/bin/sh
# Fetch the packages behind data=debian_small, data=linux and data=comparison from the Debian mirror that apt knows:
#   scripts/fetch_debian.sh small|linux [FOLDER]      FOLDER is data.root, `downloads` unless given
# The versions are of Debian 12's last release, not of its security updates: runs compare on equal text only.
set -eu
case "${1:-}" in
    small) packages="golang-1.19-src=1.19.8-2 python3.11-doc=3.11.2-6+deb12u8 postgresql-doc-15=15.18-0+deb12u1" ;;
    linux) packages="linux-source-6.1=6.1.176-1" ;;
    *) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;;
esac
folder="${2:-downloads}"
mkdir -p "$folder"
fresh="$(mktemp -d "$folder/.fetch.XXXXXX")"
trap 'rm -rf "$fresh"' EXIT
for package in $packages; do
    (cd "$fresh" && apt-get -q download "$package") || {
        echo "apt finds no $package: run apt-get update; else put it, from https://snapshot.debian.org," \
            "into $folder/${package%%=*}.deb" >&2
        exit 2
    }
    mv "$fresh/${package%%=*}"_*.deb "$folder/${package%%=*}.deb"
done
ls -l "$folder"
