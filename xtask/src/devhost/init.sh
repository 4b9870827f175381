#!/bin/busybox sh
# PID 1 of the devhost, twice: first from the initramfs (insert modules, put the
# root together, switch to it), then in the new root (run the command, report
# its exit code, power off). Talks to xtask over virtio-serial ports named
#   rvm.control   guest: "ready", "exit CODE", "fail REASON"; host: "size ROWS COLUMNS"
#   rvm.stdin rvm.stdout rvm.stderr   the command's streams
# and hvc0 is the command's terminal when it has one. run/ is what xtask appended
# for this run: command (a shell script), visible, terminal.

stage=/run/devhost

fail() {
    echo "devhost: $*" >/dev/console
    [ -z "$control" ] || echo "fail $*" >"$control"
    $stage/busybox sync
    $stage/busybox poweroff -f
    /bin/busybox poweroff -f
}

port() {
    for p in /sys/class/virtio-ports/*; do
        read -r name <"$p/name"
        if [ "$name" = "$1" ]; then
            echo "/dev/${p##*/}"
            return
        fi
    done
}

# mount_tmpfs DIR OPTIONS
mount_tmpfs() { mkdir -p "$1" && mount -t tmpfs -o "$2" tmpfs "$1"; }

assemble_root() {
    /bin/busybox mkdir -p /proc /sys /dev /run /host /new
    /bin/busybox --install /bin
    mount -t devtmpfs -o mode=755 devtmpfs /dev
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys

    while read -r module options; do
        # shellcheck disable=SC2086  # options are words
        insmod "/modules/$module" $options || echo "devhost: cannot insert $module" >/dev/console
    done </modules/order

    mount_tmpfs /run mode=755,size=50%
    mkdir -p $stage /run/devhost/out $stage/host $stage/upper
    cp /bin/busybox /init $stage/
    cp -r /run.d $stage/run

    plan9=trans=virtio,version=9p2000.L,msize=512000
    mount -t 9p -o $plan9,cache=loose,ro host $stage/host || fail "cannot mount the machine's root"
    mount -t 9p -o $plan9,cache=none,access=any out $stage/out || fail "cannot mount the output directory"
    lower=$stage/host
    if [ -b /dev/vda ]; then
        mkdir -p $stage/disk
        mount -t ext4 -o ro,noload /dev/vda $stage/disk || fail "cannot mount the disk image"
        lower=$stage/disk:$lower
    fi
    mount_tmpfs $stage/upper mode=755,size=75%
    mkdir $stage/upper/upper $stage/upper/work
    mount -t overlay -o lowerdir=$lower,upperdir=$stage/upper/upper,workdir=$stage/upper/work overlay /new ||
        fail "cannot mount the root overlay"

    mkdir -p /new/dev /new/proc /new/sys /new/run /new/tmp
    mount --move /dev /new/dev
    mount --move /proc /new/proc
    mount --move /sys /new/sys
    mount --move /run /new/run
    exec switch_root /new $stage/busybox sh $stage/init run
}

finish_root() {
    mount -t tmpfs -o mode=1777,size=75% tmpfs /tmp
    mkdir -p /dev/pts /dev/shm /dev/mqueue /run/lock
    mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t mqueue mqueue /dev/mqueue
    mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "cannot mount cgroup2"
    for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
        echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
    done
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t securityfs securityfs /sys/kernel/security
    mount -t bpf bpf /sys/fs/bpf
    ln -sfn /proc/self/fd /dev/fd
    ln -sfn fd/0 /dev/stdin
    ln -sfn fd/1 /dev/stdout
    ln -sfn fd/2 /dev/stderr
    # Nodes whose modules are there but which udev would make or open up.
    mkdir -p /dev/net
    [ -c /dev/net/tun ] || mknod /dev/net/tun c 10 200
    chmod 666 /dev/net/tun /dev/fuse
    hostname devhost
    ip link set lo up
    echo 1 >/proc/sys/net/ipv4/ip_forward
    # Directories of the machine that lie below what is fresh here.
    while read -r dir; do
        case $dir in /tmp/* | /run/* | /dev/shm/*)
            mkdir -p "$dir" && mount --bind "$stage/host$dir" "$dir" || fail "cannot show $dir"
            ;;
        esac
    done <$stage/run/visible
}

run_command() {
    # The machine's own shell: busybox would run its applets in place of programs.
    if [ -e $stage/run/terminal ]; then
        stty -F /dev/hvc0 sane
        (while read -r word rows columns; do
            [ "$word" = size ] && stty -F /dev/hvc0 rows "$rows" cols "$columns"
        done) <&3 &
        setsid -c /bin/sh $stage/run/command </dev/hvc0 >/dev/hvc0 2>&1 3<&- &
        wait $!
        code=$?
        stty -F /dev/hvc0 sane # waits until its output has left
    else
        # The ports can be opened only once, and not again through
        # /dev/stdout: the command gets pipes.
        mkfifo $stage/stdin $stage/stdout $stage/stderr
        cat <"$(port rvm.stdin)" >$stage/stdin &
        feeder=$!
        cat <$stage/stdout >"$(port rvm.stdout)" &
        stdout=$!
        cat <$stage/stderr >"$(port rvm.stderr)" &
        stderr=$!
        /bin/sh $stage/run/command <$stage/stdin >$stage/stdout 2>$stage/stderr 3<&- &
        wait $!
        code=$?
        kill $feeder 2>/dev/null
        # Daemons it left behind may hold the pipes: the rest has a second.
        (sleep 1; kill $stdout $stderr) 2>/dev/null &
        wait $stdout $stderr
    fi
}

if [ "$1" != run ]; then
    assemble_root
fi

mkdir -p $stage/bin
$stage/busybox --install $stage/bin
export PATH=$stage/bin
finish_root
control=$(port rvm.control)
exec 3<>"$control"
control=/proc/self/fd/3
echo ready >&3
run_command
echo "exit $code" >&3
poweroff -f
