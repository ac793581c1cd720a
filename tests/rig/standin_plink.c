/* A stand-in for plink.exe under Wine. Appends what it was given to the file that PLINK_RECORD names, one
   word a line, and says on stderr what plink says with -v. PLINK_BEHAVIOUR: "refuse" (every forward),
   "end" (at once, with exit code 7), "carry PORT" (the command is sent to that port of this machine, as a line, and
   standard input and output are carried there and back; at its end the file PLINK_RECORD.status holds the command's
   exit code), else it runs until the file PLINK_RECORD.stop appears, or a minute. */

#include <winsock2.h>

#include <process.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>
#include <windows.h>

static void record(FILE *file, const wchar_t *label, const wchar_t *text)
{
    char bytes[8192];
    WideCharToMultiByte(CP_UTF8, 0, label, -1, bytes, sizeof bytes, NULL, NULL);
    fprintf(file, "%s", bytes);
    WideCharToMultiByte(CP_UTF8, 0, text, -1, bytes, sizeof bytes, NULL, NULL);
    fprintf(file, "%s\n", bytes);
}

static DWORD WINAPI send_input(void *connection)
{
    static char buffer[65536];
    DWORD count;
    while (ReadFile(GetStdHandle(STD_INPUT_HANDLE), buffer, sizeof buffer, &count, NULL) && count > 0) {
        DWORD done = 0;
        while (done < count) {
            int sent = send(*(SOCKET *)connection, buffer + done, count - done, 0);
            if (sent <= 0)
                return 0;
            done += sent;
        }
    }
    shutdown(*(SOCKET *)connection, SD_SEND);
    return 0;
}

/* Runs the command as a server would: whoever listens at the port does it. Returns its exit code. */
static int carry(int port, const wchar_t *command, const wchar_t *path)
{
    static char buffer[65536];
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(0x7f000001)};
    wchar_t name[1024];
    WSADATA data;
    SOCKET connection;
    FILE *file;
    int count, code = 1;
    DWORD written;

    WSAStartup(MAKEWORD(2, 2), &data);
    connection = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(connection, (struct sockaddr *)&there, sizeof there) != 0) {
        fprintf(stderr, "FATAL ERROR: Network error: Connection refused\r\n");
        return 1;
    }
    fprintf(stderr, "Access granted\r\nStarted a shell/command\r\n");
    fflush(stderr);
    count = WideCharToMultiByte(CP_UTF8, 0, command, -1, buffer, sizeof buffer, NULL, NULL);
    buffer[count - 1] = '\n';
    send(connection, buffer, count, 0);
    CreateThread(NULL, 0, send_input, &connection, 0, NULL);
    while ((count = recv(connection, buffer, sizeof buffer, 0)) > 0)
        if (!WriteFile(GetStdHandle(STD_OUTPUT_HANDLE), buffer, count, &written, NULL))
            break;
    swprintf(name, 1023, L"%ls.status", path);
    file = _wfopen(name, L"rb");
    if (file) {
        fscanf(file, "%d", &code);
        fclose(file);
    }
    fprintf(stderr, "Session sent command exit status %d\r\n", code);
    return code;
}

int wmain(int argc, wchar_t **argv)
{
    const wchar_t *path = _wgetenv(L"PLINK_RECORD");
    const char *behaviour = getenv("PLINK_BEHAVIOUR");
    wchar_t stop[1024], first[64] = L"";
    FILE *file = _wfopen(path, L"ab");
    int i, tenths, refuse = behaviour && strcmp(behaviour, "refuse") == 0;

    fprintf(file, "pid=%d\n", _getpid());
    for (i = 0; i < argc; i++) {
        record(file, L"arg=", argv[i]);
        if (wcscmp(argv[i], L"-pwfile") == 0) {
            char password[256] = "";
            FILE *secret = _wfopen(argv[i + 1], L"rb");
            if (secret) {
                fgets(password, sizeof password, secret);
                fclose(secret);
            }
            fprintf(file, "password=%s\n", password);
        }
    }
    fclose(file);
    fprintf(stderr, "Looking up host\r\nConnecting to 192.0.2.1 port 22\r\n");
    if (behaviour && strncmp(behaviour, "carry ", 6) == 0)
        return carry(atoi(behaviour + 6), argv[argc - 1], path);
    fprintf(stderr, "Access granted\r\n");
    for (i = 1; i + 1 < argc; i++)
        if (wcscmp(argv[i], L"-R") == 0) {
            wchar_t listen[64];
            wcsncpy(listen, argv[i + 1], 63);
            *wcschr(wcschr(listen, L':') + 1, L':') = 0;
            if (!first[0])
                wcscpy(first, listen);
            fprintf(stderr, "Remote port forwarding from %ls %s\r\n", listen, refuse ? "refused" : "enabled");
        }
    fprintf(stderr, "Started a shell/command\r\n");
    fflush(stderr);
    if (behaviour && strcmp(behaviour, "end") == 0) {
        fprintf(stderr, "Session sent command exit status 7\r\n");
        return 7;
    }
    if (refuse)
        Sleep(10000);
    fprintf(stderr, "Received remote port %ls open request from 127.0.0.1:1\r\n", first);
    fflush(stderr);
    swprintf(stop, 1023, L"%ls.stop", path);
    for (tenths = 0; tenths < 600 && GetFileAttributesW(stop) == INVALID_FILE_ATTRIBUTES; tenths++)
        Sleep(100);
    fprintf(stderr, "Session sent command exit status 0\r\n");
    return 0;
}
