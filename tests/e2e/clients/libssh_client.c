/* Registers a forward with libssh and serves one connection after another:
 * host port key name public target. */
#include <arpa/inet.h>
#include <errno.h>
/* ssh_channel_accept_forward: newer releases have it by another name. */
#define SSH_SUPPRESS_DEPRECATED
#include <libssh/libssh.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void die(ssh_session session, const char *what) {
    fprintf(stderr, "%s: %s\n", what, ssh_get_error(session));
    exit(1);
}

static int origin(const char *port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) {
        perror("connect");
        exit(1);
    }
    return fd;
}

static void serve(ssh_session session, ssh_channel channel, int fd) {
    static char piece[32768];
    int from_visitor = 1, from_origin = 1;
    while (from_visitor || from_origin) {
        int moved = 0;
        if (from_visitor) {
            int n = ssh_channel_read_nonblocking(channel, piece, sizeof piece, 0);
            if (n > 0) {
                moved = 1;
                for (int at = 0; at < n;) {
                    ssize_t sent = send(fd, piece + at, n - at, MSG_NOSIGNAL);
                    if (sent < 0) return;
                    at += sent;
                }
            } else if (n == SSH_ERROR) {
                return;
            } else if (ssh_channel_is_eof(channel)) {
                shutdown(fd, SHUT_WR);
                from_visitor = 0;
            }
        }
        if (from_origin && ssh_channel_window_size(channel) > 0) {
            ssize_t n = recv(fd, piece, sizeof piece, MSG_DONTWAIT);
            if (n > 0) {
                moved = 1;
                if (ssh_channel_write(channel, piece, n) != n) return;
            } else if (n == 0) {
                ssh_channel_send_eof(channel);
                from_origin = 0;
            } else if (errno != EAGAIN) {
                return;
            }
        }
        if (!moved) {
            /* Not for ever: the library may hold what it has read already. */
            struct pollfd both[] = {{ssh_get_fd(session), POLLIN, 0}, {fd, POLLIN, 0}};
            poll(both, from_origin ? 2 : 1, 10);
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    ssh_session session = ssh_new();
    int port = atoi(argv[2]), no = 0;
    ssh_key key;
    ssh_options_set(session, SSH_OPTIONS_HOST, argv[1]);
    ssh_options_set(session, SSH_OPTIONS_PORT, &port);
    ssh_options_set(session, SSH_OPTIONS_USER, "tester");
    ssh_options_set(session, SSH_OPTIONS_PROCESS_CONFIG, &no);
    if (ssh_connect(session)) die(session, "connect");
    if (ssh_pki_import_privkey_file(argv[3], NULL, NULL, NULL, &key)) die(session, "key");
    if (ssh_userauth_publickey(session, NULL, key) != SSH_AUTH_SUCCESS) die(session, "login");
    if (ssh_channel_listen_forward(session, argv[4], atoi(argv[5]), NULL)) die(session, "forward");
    puts("registered");
    fflush(stdout);
    for (;;) {
        ssh_channel channel = ssh_channel_accept_forward(session, 1000, NULL);
        if (!channel) {
            if (!ssh_is_connected(session)) die(session, "session");
            continue;
        }
        int fd = origin(argv[6]);
        serve(session, channel, fd);
        close(fd);
        ssh_channel_close(channel);
        ssh_channel_free(channel);
    }
}
