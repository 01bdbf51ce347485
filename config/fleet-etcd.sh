#!/bin/sh
# The users and roles of a fleet's nodes in etcd, as docs/fleet.md explains them.
#
#   fleet-etcd.sh [--run] [--first] [--prefix /adit/1/] NODE...
#   fleet-etcd.sh [--run] --remove  [--prefix /adit/1/] NODE...
#
# Without --run the etcdctl commands are only printed, to be read first. They may be
# run again: what is there already stays. NODE is the node.name of a node, which is
# also the common name of its certificate for etcd.
#
#   --first    makes the users root and control too, and switches authentication on:
#              once for a cluster. From then on etcdctl needs the certificate of root.
#   --remove   takes users and roles of these nodes away, and what they told of
#              tunnels: for a node that is gone for good, or whose key was stolen.
#   --prefix   etcd.prefix of the nodes' settings, if it is another one.
#
# etcdctl finds the cluster by its own variables, for example:
#   export ETCDCTL_API=3 ETCDCTL_CACERT=etcd-ca/ca.pem
#   export ETCDCTL_CERT=etcd-ca/root.pem ETCDCTL_KEY=etcd-ca/root.key
#   export ETCDCTL_ENDPOINTS=https://etcd1.example.net:2379
#
# Exit codes: 0 done, 1 a command failed, 2 the arguments are wrong.
set -u

usage() {
	sed -n 's/^# \{0,1\}//; 3,5p' "$0" >&2
	exit 2
}

run='' first='' remove='' prefix=/adit/1/
while [ $# -gt 0 ]; do
	case $1 in
	--run) run=1 ;;
	--first) first=1 ;;
	--remove) remove=1 ;;
	--prefix)
		[ $# -gt 1 ] || usage
		prefix=$2
		shift
		;;
	-*) usage ;;
	*) break ;;
	esac
	shift
done
[ $# -gt 0 ] || usage
[ -z "$first" ] || [ -z "$remove" ] || usage
case $prefix in
*[!A-Za-z0-9._/-]* | *[!/])
	echo "fleet-etcd.sh: \"$prefix\" is no prefix: write one like /adit/1/" >&2
	exit 2
	;;
esac
for node; do
	case $node in
	'' | -* | *[!A-Za-z0-9.-]*)
		echo "fleet-etcd.sh: \"$node\" is no node's name: letters, digits, - and . alone" >&2
		exit 2
		;;
	root | control)
		echo "fleet-etcd.sh: \"$node\" is a user of its own, and no node" >&2
		exit 2
		;;
	esac
done

# One command line: printed, and run where that was asked for.
say() {
	printf '%s\n' "$1"
	[ -z "$run" ] || sh -c "$1" || {
		echo "fleet-etcd.sh: that failed" >&2
		exit 1
	}
}

# A role or a user, unless it is there.
add() {
	say "etcdctl $1 get $2 >/dev/null 2>&1 || etcdctl $1 add $2${3:+ $3}"
}

grant() {
	say "etcdctl role grant-permission $*"
}

for node; do
	if [ -n "$remove" ]; then
		say "etcdctl user delete $node"
		say "etcdctl role delete node-$node"
		say "etcdctl del ${prefix}up/node/$node"
		say "etcdctl del ${prefix}up/loc/$node/ --prefix"
		continue
	fi
	add role "node-$node"
	# A node reads everything, and writes what is its own.
	grant "node-$node" read "$prefix" --prefix
	grant "node-$node" readwrite "${prefix}up/node/$node"
	grant "node-$node" readwrite "${prefix}up/loc/$node/" --prefix
	grant "node-$node" readwrite "${prefix}live/revoked/" --prefix
	add user "$node" --no-password
	say "etcdctl user grant-role $node node-$node"
done
if [ -n "$first" ]; then
	add role control
	grant control readwrite "$prefix" --prefix
	add user control --no-password
	say "etcdctl user grant-role control control"
	add role root
	add user root --no-password
	say "etcdctl user grant-role root root"
	say "etcdctl auth enable"
fi
