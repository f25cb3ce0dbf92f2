#!/usr/bin/env bash
# setup.sh demo|test|ci: says what the demo, the tests or the continuous integration want
# from this machine and, as root on Debian or Ubuntu, installs what is missing. Anywhere
# else it says what will be left out and lets the caller go on. Never fails for a missing package.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:?usage: setup.sh demo|test|ci}
# One line each: Debian package, a file that proves it is there, why it is wanted.
demo_packages='
e2fsprogs|mkfs.ext4|makes and checks the file system of the demo disk
qemu-system-x86|qemu-system-x86_64|boots a guest from the replica
busybox-static|busybox|is the user space of that guest
'
test_packages='
xfsprogs|mkfs.xfs|file systems whose rewind is tested
btrfs-progs|mkfs.btrfs|file systems whose rewind is tested
fio|fio|judges capture and the NBD server under load
nbdkit|nbdkit|faulty NBD peers, and a peer to compare speed with
libnbd-bin|nbdinfo|nbdinfo and nbdcopy judge the NBD server
python3-libnbd|/usr/lib/python3/dist-packages/nbd.py|nbdsh judges the NBD server
qemu-utils|qemu-img|qemu-img and qemu-io judge the NBD server
qemu-block-extra|/usr/share/doc/qemu-block-extra|lets QEMU speak to NBD over TLS
sqlite3|sqlite3|judges recovered databases
postgresql|/usr/lib/postgresql|is started on recovered disks, and judges them
mariadb-server|mariadbd|is frozen by its hook, and started on recovered disks
redis-server|redis-server|is saved by its hook, and started on what was saved
shellcheck|shellcheck|checks the hooks that come with the program
rsync|rsync|is what the bytes over the WAN are compared with
jq|jq|reads the answers of benchmarks and of the demo
wine64|/usr/lib/wine/wine64|runs the agent for windows/amd64 (never as root)
'
ci_packages='
clang|clang|regenerates the eBPF objects to prove that they are what the source says
llvm|llvm-strip|strips them
libbpf-dev|/usr/include/bpf/bpf_helpers.h|headers of the eBPF program
protobuf-compiler|protoc|regenerates the API to prove that it is what the schema says
gcc|gcc|the race detector needs cgo
libc6-dev|/usr/include/stdio.h|the race detector needs cgo
file|file|shows that the binary is static
'
case $want in
demo) packages=$demo_packages ;;
test) packages=$demo_packages$test_packages ;;
ci) packages=$demo_packages$test_packages$ci_packages ;;
*) echo "setup.sh: unknown set $want" >&2; exit 2 ;;
esac

there() { # there FILE-OR-COMMAND
	case $1 in
	/*) [ -e "$1" ] ;;
	*) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
	esac
}

missing=()
while IFS='|' read -r package proof why; do
	[ -n "$package" ] || continue
	there "$proof" || missing+=("$package|$why")
done <<<"$packages"

can_install=no
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then can_install=yes; fi
updated=no
update() {
	[ $updated = yes ] && return
	updated=yes
	apt-get -qq update >/dev/null || echo "setup: apt-get update failed; trying with the package lists that are there"
}

if [ ${#missing[@]} -gt 0 ]; then
	if [ $can_install = yes ]; then
		echo "setup: installing for $want:"
	else
		echo "setup: not root on Debian or Ubuntu, so nothing is installed; $want goes on without:"
	fi
	names=()
	for line in "${missing[@]}"; do
		printf '  %-20s %s\n' "${line%%|*}" "${line#*|}"
		names+=("${line%%|*}")
	done
	if [ $can_install = yes ]; then
		update
		if ! DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${names[@]}" >/dev/null; then
			echo "setup: apt-get install failed; $want goes on and leaves out what needs these packages"
		fi
	fi
fi

# A guest kernel for the replica to boot: unpacked, not installed.
guest=${FARSIDE_GUEST_KERNEL:-.cache/guest-kernel}
if ! ls "$guest"/boot/vmlinuz-* >/dev/null 2>&1; then
	if [ "$can_install" = yes ] && [ "$(dpkg --print-architecture)" = amd64 ]; then
		update
		package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-/{print $2; exit}')
		: "${package:=$(apt-cache depends linux-image-virtual 2>/dev/null | awk '/Depends: linux-image-[0-9]/{print $2; exit}')}"
		if [ -n "$package" ]; then
			echo "setup: fetching $package into $guest: the kernel of the demo's guest (unpacked there, not installed)"
			tmp=$(mktemp -d)
			trap 'rm -rf "$tmp"' EXIT
			chmod 755 "$tmp"
			if (cd "$tmp" && apt-get -qq -o APT::Sandbox::User=root download "$package" >/dev/null) && dpkg -x "$tmp"/*.deb "$tmp/x"; then
				# Ubuntu keeps the modules in a package of their own.
				if ! compgen -G "$tmp/x/lib/modules/*" >/dev/null && ! compgen -G "$tmp/x/usr/lib/modules/*" >/dev/null; then
					(cd "$tmp" && apt-get -qq -o APT::Sandbox::User=root download "${package/image/modules}" >/dev/null &&
						dpkg -x "${package/image/modules}"*.deb x) || true
				fi
				mkdir -p "$(dirname "$guest")"
				rm -rf "$guest"
				mv "$tmp/x" "$guest"
			else
				echo "setup: could not fetch it; the demo will not boot a guest"
			fi
		fi
	else
		echo "setup: no guest kernel in $guest; the demo uses the machine's own kernel in /boot if it can, else boots no guest"
	fi
fi
