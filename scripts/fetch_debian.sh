#!/bin/sh
# Fetch the packages behind data=debian_small or data=linux, by name, from the Debian mirror that apt knows:
#   scripts/fetch_debian.sh small|linux [FOLDER]      FOLDER is data.root, `downloads` unless given
# Debian 12 has them. A mirror keeps only the newest build of a package, so the manifest's hash says which text it was.
set -eu
case "${1:-}" in
    small) packages="golang-1.19-src python3.11-doc postgresql-doc-15" ;;
    linux) packages="linux-source-6.1" ;;
    *) sed -n '2,4s/^# //p' "$0" >&2; exit 2 ;;
esac
folder="${2:-downloads}"
mkdir -p "$folder"
fresh="$(mktemp -d "$folder/.fetch.XXXXXX")"
trap 'rm -rf "$fresh"' EXIT
for package in $packages; do
    (cd "$fresh" && apt-get -q download "$package")
    mv "$fresh/$package"_*.deb "$folder/$package.deb"
done
ls -l "$folder"
