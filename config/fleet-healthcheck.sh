#!/bin/sh
# Has BGP announce an anycast prefix while adit takes visitors, and no longer.
# docs/fleet.md, "Anycast", says why and how.
#
#   fleet-healthcheck.sh check                  asks once; exit code 0 ready, 1 not
#   fleet-healthcheck.sh bird PROTOCOL...       for BIRD: enables these protocols, or
#                                               disables them, until it is stopped
#   fleet-healthcheck.sh bird-down PROTOCOL...  disables them, once
#   fleet-healthcheck.sh exabgp PREFIX...       a process of ExaBGP's: announces these
#                                               prefixes, or withdraws them
#
# A node that says that it is not ready (it starts or drains) is withdrawn at once. One
# that does not answer is asked FALL times, so that a hiccup moves nobody. Until the
# first verdict what stands is left alone; at the end all is withdrawn.
#
# Exit codes: 0 ready, or stopped; 1 not ready, or BIRD refused; 2 wrong arguments.
set -uf

: "${ADIT_READYZ:=http://127.0.0.1:9090/readyz}" # needs no token
: "${INTERVAL:=1}"                               # seconds between questions
: "${TIMEOUT:=2}"                                # seconds for an answer
: "${RISE:=3}"                                   # good answers in a row to announce
: "${FALL:=3}"                                   # missing answers in a row to withdraw
: "${BIRDC:=birdc}"

log() {
	echo "fleet-healthcheck: $*" >&2
}

# yes, no, or silent.
ask() {
	if code=$(curl --silent --output /dev/null --noproxy '*' --max-time "$TIMEOUT" \
		--write-out '%{http_code}' "$ADIT_READYZ"); then
		if [ "$code" = 200 ]; then answer=yes; else answer=no; fi
	else
		answer=silent
	fi
}

# Tells BIRD to enable or disable. It is told again at each turn, because BIRD may
# have been started anew, with all disabled.
bird() {
	failed=0
	for protocol in $targets; do
		said=$("$BIRDC" "$1" "$protocol" 2>&1)
		case $said in
		*": enabled"* | *": disabled"* | *": already "*) ;;
		*)
			log "birdc $1 $protocol: $said"
			failed=1
			;;
		esac
	done
	return "$failed"
}

# Tells ExaBGP, which reads our standard output, to announce or withdraw.
exabgp() {
	for prefix in $targets; do
		printf '%s route %s next-hop self\n' "$1" "$prefix" || exit 1
	done
}

# Brings what is announced up or down.
turn() {
	was=$state state=$1
	[ "$was" = "$state" ] || log "$state ($answer): $targets"
	case $mode-$state in
	bird-up) bird enable ;;
	bird-down) bird disable ;;
	exabgp-up) [ "$was" = up ] || exabgp announce ;;
	exabgp-down) [ "$was" = down ] || exabgp withdraw ;;
	esac
}

stop() {
	trap '' TERM INT HUP
	answer=stopped
	turn down
	exit 0
}

watch() {
	state=unknown good=0 missing=0
	trap stop TERM INT HUP
	while :; do
		ask
		case $answer in
		yes) good=$((good + 1)) missing=0 ;;
		no) good=0 missing=$FALL ;;
		silent) good=0 missing=$((missing + 1)) ;;
		esac
		if [ "$good" -ge "$RISE" ]; then
			turn up
		elif [ "$missing" -ge "$FALL" ]; then
			turn down
		fi
		# ExaBGP may have ended without a word.
		if [ "$mode" = exabgp ] && ! kill -0 "$PPID" 2>/dev/null; then exit 0; fi
		# In the background, so that a signal does not wait for its end.
		sleep "$INTERVAL" &
		wait $!
	done
}

mode=${1:-}
[ $# -eq 0 ] || shift
targets=$*
case $mode in
check)
	ask
	[ "$answer" = yes ] && exit 0
	log "not ready ($answer)"
	exit 1
	;;
bird-down) [ -z "$targets" ] || { bird disable; exit; } ;;
bird | exabgp) [ -z "$targets" ] || watch ;;
esac
sed -n 's/^# \{0,1\}//; 5,10p' "$0" >&2
exit 2
