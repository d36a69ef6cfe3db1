#!/usr/bin/env bash
# Run the tests of the core and of fairseq under every Python that is here; `make test-matrix`.
# One environment each in .matrix/, made once. Exit 1 if any of them fails.
set -uo pipefail
cd "$(dirname "$0")/.."

versions=(${VERSIONS:-3.10 3.11 3.12})
tests=(${TESTS:-tests/core tests/fairseq})
ran=() skipped=() failed=()

find_python() {
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python /opt/python/"$1"*/bin/python; do
    if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

install() {
  local python=$1 folder=$2
  "$python" -m venv "$folder" || return
  # fairseq 0.12.2, which Python 3.10 gets, has metadata that pip 24.1 and later refuse, and is
  # older than numpy 2 and than torch's safe loading.
  if "$folder/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    "$folder/bin/python" -m pip install --quiet 'pip<24.1' || return
    "$folder/bin/python" -m pip install --quiet --editable '.[nmt,test]' 'torch<2.3' 'numpy<1.24'
  else
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
      "$folder/bin/python" -m pip install --quiet --editable '.[nmt,test]'
  fi
}

for version in "${versions[@]}"; do
  folder=.matrix/$version
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    skipped+=("$version (no python$version with venv)")
    continue
  fi
  if [ ! -e "$folder/.installed" ]; then
    echo "python $version: installing into $folder (some minutes, once)"
    rm -rf "$folder"
    if ! install "$python" "$folder"; then
      failed+=("$version (could not be installed)")
      continue
    fi
    touch "$folder/.installed"
  fi
  found=$("$folder/bin/python" -c 'import logging; logging.disable(); import fairseq, torch; print("fairseq", fairseq.__version__ + ", torch", torch.__version__)')
  echo "python $version, $found"
  if "$folder/bin/python" -m pytest -q "${tests[@]}"; then
    ran+=("$version ($found)")
  else
    failed+=("$version ($found)")
  fi
done

for entry in ${ran[@]+"${ran[@]}"}; do echo "passed:  $entry"; done
for entry in ${skipped[@]+"${skipped[@]}"}; do echo "skipped: $entry"; done
for entry in ${failed[@]+"${failed[@]}"}; do echo "failed:  $entry"; done
[ ${#failed[@]} -eq 0 ]
