#!/usr/bin/env bash
# Does what an edge client needs run on 64-bit ARM Linux? Asked on x86-64 Debian, under emulation.
#
#   scripts/check_aarch64.sh [--root FOLDER] [--requirements FILE] [--artifacts FOLDER]
#
#   --root          where to put the ARM system (about 1 GB) to look at it later; a folder that is
#                   empty or not there (default: a temporary folder, deleted at the end)
#   --requirements  what a client needs (default: client/requirements.edge-plain.txt)
#   --artifacts     edge artifacts for `fedtune edge verify`; without them a small graph is built,
#                   trained and compared with numpy
#   PYTHON          the Python of this machine, with pip, and with onnx unless there are artifacts
#
# Nothing is installed on this machine and no right of root is needed: Debian's packages, of its
# archive that this machine uses, are unpacked into the folder. Exits 0 if all that is required
# ran, otherwise 1.
#
# It says that the machine code of the wheels runs, on these processors. It says nothing about
# speed, memory or temperature, and nothing about a board's kernel: the kernel is this machine's.
#
# shellcheck disable=SC2317 # functions are called by name
set -euo pipefail
export LC_ALL=C

PROCESSORS=(cortex-a53 cortex-a76 max) # the oldest; dot products, half floats; all QEMU has (SVE)
OLDEST_GLIBC=28                        # 2.28, of 2018

fail() {
    printf 'check_aarch64: %s\n' "$*" >&2
    exit 1
}

repository=$(realpath "$(dirname "$0")/..")
python=${PYTHON:-python3}
root=
artifacts=
requirements=$repository/client/requirements.edge-plain.txt
while (($#)); do
    (($# > 1)) || fail "$1 needs a value; options are --root, --requirements and --artifacts"
    case $1 in
        --root) root=$(realpath -m "$2") ;;
        --requirements) requirements=$(realpath -m "$2") ;;
        --artifacts) artifacts=$(realpath -m "$2") ;;
        *) fail "unknown option $1; options are --root, --requirements and --artifacts" ;;
    esac
    shift 2
done

for tool in apt-get dpkg dpkg-deb; do
    type "$tool" >/dev/null 2>&1 || fail "there is no $tool: run this on Debian"
done
[[ $(dpkg --print-architecture) == amd64 ]] || fail "this machine is not x86-64"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -r $keyring ]] || fail "there is no $keyring: install debian-archive-keyring"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip; set PYTHON to one that has"
[[ -n $artifacts ]] || "$python" -c 'import onnx, numpy' 2>/dev/null ||
    fail "$python has no onnx to build a graph with: pip install onnx, or give --artifacts"
[[ -r $requirements ]] || fail "cannot read $requirements; name a file with --requirements"
[[ -z $artifacts || -d $artifacts ]] || fail "$artifacts is not a folder"

if [[ -z $root ]]; then
    root=$(mktemp --directory)
    trap 'rm -rf "$root"' EXIT
    chmod 755 "$root" # apt downloads as a user of its own
elif [[ -e $root && -n $(ls -A "$root") ]]; then
    fail "$root is not an empty folder"
fi
system=$root/system     # Debian 12 for ARM
emulator=$root/emulator # QEMU 10, of Debian 13: the one of Debian 12 shows programs the processors
                        # of this machine in /proc/cpuinfo, and onnxruntime then crashes
packages=$root/packages # what pip installs
apt=$root/apt
mkdir -p "$system" "$emulator" "$packages" "$apt"/{lists,archives}/partial
: >"$root/failures"
failed=0

row() { # LABEL RESULT SECONDS FOUND
    printf '%-34s %-6s %7s  %s\n' "$@"
}

check() { # LABEL COMMAND...: a row with what the command prints, or with its last words
    local label=$1 result=ok began=${EPOCHREALTIME/./} tenths found
    shift
    "$@" >"$root/output" 2>"$root/errors" || result="exit $?"
    tenths=$(((${EPOCHREALTIME/./} - began) / 100000))
    found=$(tr -s '[:space:]' ' ' <"$root/output")
    if [[ $result != ok ]]; then
        failed=1
        # Of a crash the emulator tells the signal, and bash then the command.
        found="$result: $(cat "$root/output" "$root/errors" |
            grep --invert-match -e '^$' -e "^$0: line " | tail -n 1)"
        result=FAILED
        { printf '\n%s\n' "$label" && cat "$root/output" "$root/errors"; } >>"$root/failures"
    fi
    row "$label" "$result" "$((tenths / 10)).$((tenths % 10))" "$found"
    [[ $result == ok ]]
}

finish() {
    if ((failed)); then
        cat "$root/failures" >&2
        printf '\nNot all that is required ran; the messages are above.\n'
    else
        printf '\nAll that is required ran.\n'
    fi
    exit "$failed"
}

# What follows is called by name, and must stop by itself: `set -e` does not reach what is checked.

debian() { # unpacks both: the system for ARM, and the emulator for this machine
    local mirror options file folder
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' \
        'Created-By: Packages' | awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
    if [[ -z $mirror ]]; then
        echo "apt knows no archive of Debian: run apt-get update" >&2
        return 1
    fi
    printf 'deb [arch=%s signed-by=%s] %s %s main\n' \
        arm64 "$keyring" "$mirror" bookworm amd64 "$keyring" "$mirror" trixie >"$apt/sources.list"
    : >"$apt/status"
    options=(-o APT::Architecture=arm64 -o "APT::Architectures=arm64,amd64"
        -o "Dir::State=$apt" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt"
        -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-)
    apt-get "${options[@]}" update --error-on=any >&2 || return
    apt-get "${options[@]}" install --download-only --yes --no-install-recommends \
        python3.11-minimal libpython3.11-stdlib libstdc++6 qemu-user:amd64 >&2 || return
    for file in "$apt"/archives/*.deb; do
        folder=$system
        [[ $file != *_amd64.deb ]] || folder=$emulator
        dpkg-deb --extract "$file" "$folder" || return
    done
    "$emulator/usr/bin/qemu-aarch64" --version | head -n 1
}

emulated() ( # PROCESSOR ARGUMENTS...: python3.11 of the ARM system
    # No site packages (-S): a path that is not in the ARM system is looked up on this machine.
    cd "$root" && env --ignore-environment PATH=/usr/bin:/bin HOME="$root" PYTHONPATH="$packages" \
        "$emulator/usr/bin/qemu-aarch64" -cpu "$1" -L "$system" \
        "$system/usr/bin/python3.11" -S "${@:2}"
)

wheels() { # COMMAND VERSION PLATFORM ARGUMENTS...: pip for another machine
    local platforms=(--platform "manylinux2014_$3") minor
    for ((minor = 17; minor <= OLDEST_GLIBC; minor++)); do
        platforms+=(--platform "manylinux_2_${minor}_$3")
    done
    "$python" -m pip "$1" --disable-pip-version-check --quiet --only-binary=:all: \
        --implementation cp --python-version "$2" "${platforms[@]}" "${@:4}"
}

install_requirements() {
    wheels install 3.11 aarch64 --target "$packages" --no-deps --requirement "$requirements" >&2 ||
        return
    echo "$(find "$packages" -maxdepth 1 -name '*.dist-info' | wc -l) packages"
}

install_fedtune() { # from a copy: a build leaves files beside the source
    mkdir "$root/source" &&
        cp -r "$repository"/{fedtune,pyproject.toml,README.md,LICENSE} "$root/source" &&
        wheels install 3.11 aarch64 --target "$packages" --no-deps "$root/source"
}

training_wheel() { # PLATFORM: the wheel of onnxruntime's own training for it, if there is one
    local version
    for version in 3.11 3.12 3.10 3.9 3.8; do
        if wheels download "$version" "$1" --no-deps --dest "$root/training" \
            onnxruntime-training-cpu==1.19.2 2>"$root/errors"; then
            basename "$root"/training/*
            rm -r "$root/training"
            return
        fi
    done
    echo "none for CPython 3.8 to 3.12 ($(grep ^ERROR "$root/errors" | tail -n 1))"
}

row check result seconds found
check "Debian's packages" debian || finish
check "Python on ARM" emulated cortex-a53 -c \
    'import platform as p; print("CPython", p.python_version(), p.machine(), *p.libc_ver())' || finish
check "wheels for ARM" install_requirements || finish
for record in "$packages"/*.dist-info/RECORD; do
    grep --quiet '\.so,' "$record" || continue
    name=$(sed -n '/^Name: /{s///p;q}' "$(dirname "$record")/METADATA")
    check "import $name" emulated cortex-a53 \
        "$repository/scripts/check_aarch64.py" import "$packages" "$name" || true
done

if [[ -n $artifacts ]]; then
    check "wheel of fedtune" install_fedtune || finish
    for processor in "${PROCESSORS[@]}"; do
        check "edge verify, $processor" emulated "$processor" \
            -m fedtune.cli edge verify "$artifacts" --json || true
    done
else
    check "graph built here" "$python" "$repository/scripts/check_aarch64.py" build "$root" || finish
    for processor in "${PROCESSORS[@]}"; do
        check "trained, $processor" emulated "$processor" \
            "$repository/scripts/check_aarch64.py" step "$root" || true
    done
fi

# A fact, not a requirement: why a step of training is an ordinary inference graph. The first line
# proves that the question is asked rightly.
for platform in x86_64 aarch64; do
    row "onnxruntime-training-cpu 1.19.2" - - "$platform: $(training_wheel "$platform")"
done
finish
