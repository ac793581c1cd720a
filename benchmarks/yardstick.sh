#!/bin/bash
#
# What start-up is measured against: a launch script of the kind that Tunnel replaces. It does what such scripts
# did, in the way they did it, and starts the client that TUNNEL_SSH names. Nobody installs it.
#
# usage: yardstick.sh [user[:password]@]host[:port] kernel_path link_name
#
# A script named *_sub.sh launches a compute kernel, any other a controller kernel.

#
# Where this script lies, and what it is called
#
script_dir=$(cd "$(dirname "$0")" && pwd)
script_name=$(basename "$0" .sh)

#
# What the system calls things
#
system=$(uname -s)
case $system in
Darwin)
    # Python, Perl and ssh of the system itself come first
    PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH
    ask_program="$script_dir/$script_name-askpass.sh"
    ;;
Linux)
    # The front end's own libraries break ssh
    unset LD_LIBRARY_PATH
    ask_program="$script_dir/$script_name-askpass.sh"
    ;;
*)
    echo "$script_name: $system is not supported" >&2
    exit 1
    ;;
esac
export PATH

#
# The log file: one folder for each day, one file for each launch
#
log_dir="$script_dir/Logs/$(date +%Y-%m-%d)"
mkdir -p "$log_dir"
log_file="$log_dir/${script_name}_$(date +%Y-%m-%d-%H%M%S)_$$.log"
exec 2>>"$log_file"

log() {
    echo "$(date +%H:%M:%S) $*" >>"$log_file"
}

#
# Arguments
#
if [ $# -ne 3 ]; then
    log "expected 3 arguments, not $#"
    exit 1
fi
remote=$1
kernel_path=$2
link_name=$3
log "$script_name on $system"
log "kernel: $kernel_path"
log "link:   $link_name"

#
# [user[:password]@]host[:port]
#
case $remote in
*@*)
    login=$(echo "$remote" | sed -e 's/@[^@]*$//')
    place=$(echo "$remote" | sed -e 's/^.*@//')
    ;;
*)
    login=
    place=$remote
    ;;
esac
user=$(echo "$login" | cut -d : -f 1)
password=
case $login in
*:*)
    password=$(echo "$login" | cut -d : -f 2-)
    ;;
esac
host=$(echo "$place" | cut -d : -f 1)
port=22
case $place in
*:*)
    port=$(echo "$place" | cut -d : -f 2)
    ;;
esac
log "host:   $host, port $port, user $user"

#
# DATA@HOST,MESSAGE@HOST
#
data_end=$(echo "$link_name" | awk -F , '{ print $1 }')
message_end=$(echo "$link_name" | awk -F , '{ print $2 }')
data_port=$(echo "$data_end" | awk -F @ '{ print $1 }')
data_host=$(echo "$data_end" | awk -F @ '{ print $2 }')
message_port=$(echo "$message_end" | awk -F @ '{ print $1 }')
message_host=$(echo "$message_end" | awk -F @ '{ print $2 }')
if [ -z "$data_port" ] || [ -z "$message_port" ]; then
    log "not the name of a TCPIP link: $link_name"
    exit 1
fi

#
# The preemptive and the service link come after the highest port of the main link
#
base_port=$data_port
if [ "$message_port" -gt "$base_port" ]; then
    base_port=$message_port
fi

#
# Forwards: the main link's ports lead from there to here, the others from here to there
#
forwards=(-R "127.0.0.1:$data_port:$data_host:$data_port")
forwards+=(-R "127.0.0.1:$message_port:$message_host:$message_port")
case $script_name in
*_sub)
    kernel_options="-lmverbose -subkernel -noinit"
    options=(-f)
    ;;
*)
    kernel_options="-initfile tunnel.m -lmverbose"
    options=(-A -C)
    for number in 1 2 3 4; do
        link_port=$((base_port + number))
        forwards+=(-L "127.0.0.1:$link_port:127.0.0.1:$link_port")
    done
    ;;
esac

#
# Options of the client
#
options+=(-v -x)
options+=(-o CheckHostIP=no -o StrictHostKeyChecking=no -o ControlMaster=no)
options+=(-p "$port")
if [ -n "$user" ]; then
    options+=(-l "$user")
fi
if [ -n "$password" ]; then
    export SSH_ASKPASS=$ask_program DISPLAY=${DISPLAY:-none:0.0}
fi

#
# The kernel's command line
#
link="$data_port@127.0.0.1,$message_port@127.0.0.1"
command="\"$kernel_path\" -mathlink -LinkMode Connect -LinkProtocol TCPIP -LinkName $link"
command="$command $kernel_options"
log "client: ${TUNNEL_SSH:-ssh} ${options[*]} ${forwards[*]} $host $command"

exec "${TUNNEL_SSH:-ssh}" "${options[@]}" "${forwards[@]}" "$host" "$command"
