/* Registers a forward with libssh2 and serves one connection after another:
 * host port key name public target. */
#include <arpa/inet.h>
#include <errno.h>
#include <libssh2.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int dial(const char *host, const char *port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    inet_pton(AF_INET, host, &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) {
        perror("connect");
        exit(1);
    }
    return fd;
}

static void die(LIBSSH2_SESSION *session, const char *what) {
    char *why = "";
    libssh2_session_last_error(session, &why, NULL, 0);
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void serve(LIBSSH2_CHANNEL *channel, int ssh, int fd) {
    static char piece[32768], up[32768];
    int from_visitor = 1, from_origin = 1;
    ssize_t held = 0, at = 0;
    while (from_visitor || from_origin) {
        int moved = 0;
        if (from_visitor) {
            ssize_t n = libssh2_channel_read(channel, piece, sizeof piece);
            if (n > 0) {
                moved = 1;
                for (ssize_t done = 0; done < n;) {
                    ssize_t sent = send(fd, piece + done, n - done, MSG_NOSIGNAL);
                    if (sent < 0) return;
                    done += sent;
                }
            } else if (n < 0 && n != LIBSSH2_ERROR_EAGAIN) {
                return;
            } else if (libssh2_channel_eof(channel)) {
                shutdown(fd, SHUT_WR);
                from_visitor = 0;
            }
        }
        if (from_origin && at == held) {
            ssize_t n = recv(fd, up, sizeof up, MSG_DONTWAIT);
            if (n > 0) {
                held = n;
                at = 0;
            } else if (n == 0) {
                int rc = libssh2_channel_send_eof(channel);
                if (rc == 0) from_origin = 0;
                else if (rc != LIBSSH2_ERROR_EAGAIN) return;
            } else if (errno != EAGAIN) {
                return;
            }
        }
        if (at < held) {
            ssize_t n = libssh2_channel_write(channel, up + at, held - at);
            if (n > 0) {
                moved = 1;
                at += n;
            } else if (n < 0 && n != LIBSSH2_ERROR_EAGAIN) {
                return;
            }
        }
        if (!moved) {
            /* Not for ever: the library may hold what it has read already. */
            struct pollfd both[] = {{ssh, POLLIN, 0}, {fd, POLLIN, 0}};
            poll(both, from_origin && at == held ? 2 : 1, 10);
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    int ssh = dial(argv[1], argv[2]);
    libssh2_init(0);
    LIBSSH2_SESSION *session = libssh2_session_init();
    if (libssh2_session_handshake(session, ssh)) die(session, "handshake");
    if (libssh2_userauth_publickey_fromfile(session, "tester", NULL, argv[3], "")) die(session, "login");
    LIBSSH2_LISTENER *listener = libssh2_channel_forward_listen_ex(session, argv[4], atoi(argv[5]), NULL, 16);
    if (!listener) die(session, "forward");
    puts("registered");
    fflush(stdout);
    for (;;) {
        libssh2_session_set_blocking(session, 1);
        LIBSSH2_CHANNEL *channel = libssh2_channel_forward_accept(listener);
        if (!channel) die(session, "session");
        libssh2_session_set_blocking(session, 0);
        int fd = dial("127.0.0.1", argv[6]);
        serve(channel, ssh, fd);
        close(fd);
        libssh2_session_set_blocking(session, 1);
        libssh2_channel_close(channel);
        libssh2_channel_free(channel);
    }
}
