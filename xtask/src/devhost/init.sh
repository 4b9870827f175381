#!/bin/busybox sh
# PID 1 of the devhost, twice: first from the initramfs (insert modules, put the
# root together, switch to it), then in the new root (run the command, report
# its exit code, power off). Talks to xtask over virtio-serial ports named
#   rvm.control   guest: "ready", "exit CODE", "fail REASON"; host: "size ROWS COLUMNS"
#   rvm.heartbeat   host: a byte now and then, for the interrupt that comes with it
#   rvm.stdin rvm.stdout rvm.stderr   the command's streams
# and hvc0 is the command's terminal when it has one. run/ is what xtask appended
# for this run: command (a shell script), visible, terminal, cgroups, modules.

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

insert_modules() {
    while read -r module; do
        insmod "/modules/$module" || echo "devhost: cannot insert $module" >/dev/console
    done <"/modules/$1"
}

# mount_cgroups v2|hybrid|v1, where systemd has them
mount_cgroups() {
    if [ "$1" = v2 ]; then
        mount -t cgroup2 cgroup2 /sys/fs/cgroup || return
        for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
            echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
        done
        return
    fi
    mount_tmpfs /sys/fs/cgroup mode=755
    for controllers in cpu,cpuacct cpuset memory blkio pids freezer devices perf_event hugetlb; do
        mkdir /sys/fs/cgroup/$controllers
        mount -t cgroup -o $controllers cgroup /sys/fs/cgroup/$controllers || return
    done
    for alias in cpu cpuacct; do
        ln -s cpu,cpuacct /sys/fs/cgroup/$alias
    done
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd || return
    if [ "$1" = hybrid ]; then
        mkdir /sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified || return
    fi
}

assemble_root() {
    /bin/busybox mkdir -p /proc /sys /dev /run /new
    /bin/busybox --install /bin
    mount -t devtmpfs -o mode=755 devtmpfs /dev
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    insert_modules root
    insert_modules more &
    more=$!

    mount_tmpfs /run mode=755,size=50%
    mkdir -p $stage/out $stage/host $stage/upper $stage/bin /run/lock
    cp /bin/busybox /init $stage/
    cp -r /run.d $stage/run

    plan9=trans=virtio,version=9p2000.L,msize=512000
    mount -t 9p -o $plan9,cache=loose,ro host $stage/host || fail "cannot mount the machine's root"
    mount -t 9p -o $plan9,cache=none,access=any out $stage/out || fail "cannot mount the output directory"
    mount_tmpfs $stage/upper mode=755,size=75%
    mkdir $stage/upper/upper $stage/upper/work
    layers=lowerdir=$stage/host,upperdir=$stage/upper/upper,workdir=$stage/upper/work
    mount -t overlay -o $layers overlay /new || fail "cannot mount the root overlay"

    mount_tmpfs /new/tmp mode=1777,size=75%
    # Directories of the machine that lie below what is fresh here.
    while read -r dir; do
        case $dir in
        /tmp/*) mkdir -p "/new$dir" && mount --bind "$stage/host$dir" "/new$dir" ;;
        /run/*) mkdir -p "$dir" && mount --bind "$stage/host$dir" "$dir" ;;
        esac || fail "cannot show $dir"
    done <$stage/run/visible

    mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/net
    mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t mqueue mqueue /dev/mqueue
    ln -sfn /proc/self/fd /dev/fd
    ln -sfn fd/0 /dev/stdin
    ln -sfn fd/1 /dev/stdout
    ln -sfn fd/2 /dev/stderr
    mount_cgroups "$(cat $stage/run/cgroups)" || fail "cannot mount cgroups"
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t securityfs securityfs /sys/kernel/security
    mount -t bpf bpf /sys/fs/bpf
    # Where modprobe looks, which the kernel starts for what it finds missing.
    mkdir -p /new/lib/modules
    ln -sfn "$(cat $stage/run/modules)" "/new/lib/modules/$(uname -r)"
    hostname devhost
    ip link set lo up
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding

    wait $more
    # udev would open these up.
    chmod 666 /dev/net/tun /dev/vhost-net /dev/fuse
    for dir in dev proc sys run; do
        mkdir -p /new/$dir
        mount --move /$dir /new/$dir
    done
    exec switch_root /new $stage/busybox sh $stage/init run
}

# Linux patches its scheduler when the first VM comes and when the last one goes
# (kernel/sched/core.c, preempt_notifier_key), and KVM itself when local APICs
# come and go. Each patch passes through a breakpoint, which QEMU's translator
# now and then keeps: every processor then traps for ever. One VM with one
# processor that stays for good leaves nothing to patch. perl-base is on every Debian.
keep_a_vm() {
    mkfifo $stage/kept
    /usr/bin/perl -e '
        open(my $kvm, "+<", "/dev/kvm") or die "/dev/kvm: $!";
        my $fd = ioctl($kvm, 0xAE01, 0) or die "KVM_CREATE_VM: $!";
        open(my $vm, "+<&=", $fd + 0) or die "VM: $!";
        ioctl($vm, 0xAE60, 0) or die "KVM_CREATE_IRQCHIP: $!";
        my $vcpu = ioctl($vm, 0xAE41, 0) or die "KVM_CREATE_VCPU: $!";
        open(my $kept, ">", $ARGV[0]); print $kept "kept\n"; close($kept);
        sleep' $stage/kept 3<&- 2>/dev/console &
    read -r kept <$stage/kept
}

run_command() {
    # The machine's own shell: busybox would run its applets in place of programs.
    if [ -e $stage/run/terminal ]; then
        stty -F /dev/hvc0 sane
        (while read -r word rows columns; do
            [ "$word" = size ] && stty -F /dev/hvc0 rows "$rows" cols "$columns"
        done) <&3 &
        # One open file for reading and writing, as terminals have: programs read from their standard error.
        setsid -c /bin/sh $stage/run/command <>/dev/hvc0 >&0 2>&0 3<&- &
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

$stage/busybox --install $stage/bin
export PATH=$stage/bin
control=$(port rvm.control)
exec 3<>"$control"
control=/proc/self/fd/3
cat <"$(port rvm.heartbeat)" >/dev/null 3<&- &
keep_a_vm
echo ready >&3
run_command
echo "exit $code" >&3
poweroff -f
