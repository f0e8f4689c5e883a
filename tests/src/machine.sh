#!/bin/bash
# A machine of its own for a test: systemd as process 1, on a throwaway overlay over this system's files, with
# processes, network, host name and control groups of its own. Needs root.
#
# machine.sh DIR: prints the process id of its systemd as soon as there is one, and stays until that or standard input ends.
set -euo pipefail

if [ "$1" != --inside ]; then
    dir=$1
    mount --make-rprivate /
    mount -t tmpfs -o size=2g,mode=755 tmpfs "$dir"
    mkdir "$dir"/{upper,work,root,cgroup}
    mount -t overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" overlay "$dir/root"
    # Below a control group of its own, which is the root of what it sees.
    mount -t cgroup2 cgroup2 "$dir/cgroup"
    group="$dir/cgroup/adit-machine-$$"
    mkdir "$group"
    exec 3<&0
    unshare --pid --fork --kill-child \
        bash -c 'echo $$ >"$2/cgroup.procs"; exec unshare --cgroup --mount bash "$0" --inside "$1"' \
        "$0" "$dir/root" "$group" </dev/null >/dev/null 3<&- &
    machine=$!
    # What ends a test ends its whole group. This stays to put everything away.
    trap '' TERM HUP INT
    # Its only child; without one, the command before it has said why.
    while kill -0 $machine 2>/dev/null && ! pgrep --parent $machine; do sleep 0.01; done
    # Whoever holds the other end of standard input may be killed: then the machine ends, too.
    { cat <&3; pkill --signal KILL --parent $machine; } >/dev/null &
    wait $machine 2>/dev/null || true
    # What was killed leaves its control group a moment later.
    for _ in {1..100}; do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.05
    done
    exit
fi

root=$2
cd "$root"
mount -t proc proc proc
# Its systemd must not set this system's kernel.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for fresh in tmp var/tmp; do
    mount -t tmpfs -o mode=1777 tmpfs "$fresh"
done
for fresh in run var/log dev; do
    mount -t tmpfs -o mode=755 tmpfs "$fresh"
done
for device in null zero full random urandom tty; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
# A new system: nothing enabled, no file systems to mount, an identity of its own, and packages may start services
# (images of Debian for containers forbid it).
rm -f usr/sbin/policy-rc.d
rm -rf etc/systemd/system/*.wants etc/systemd/system/*.requires
# Nobody sits in front of it; and each user may have 128 inotify instances only, on all machines together.
for unit in systemd-{logind.service,ask-password-{console,wall}.path} systemd-{sysctl,modules-load,remount-fs,update-utmp,firstboot}.service \
    dev-hugepages.mount sys-kernel-{debug,tracing,config}.mount sys-fs-fuse-connections.mount; do
    ln -sf /dev/null "etc/systemd/system/$unit"
done
: >etc/fstab
: >etc/machine-id
echo machine >etc/hostname
hostname machine
pivot_root . mnt
cd /
umount -l mnt
exec env -i container=adit-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=multi-user.target --log-target=journal
