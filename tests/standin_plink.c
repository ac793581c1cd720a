/* A stand-in for plink.exe under Wine. Appends what it was given to the file that PLINK_RECORD names, one
   word a line, and says on stderr what plink says with -v. PLINK_BEHAVIOUR: "refuse" (every forward),
   "end" (at once, with exit code 7), else it runs until the file PLINK_RECORD.stop appears, or a minute. */

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
    fprintf(stderr, "Looking up host\r\nConnecting to 192.0.2.1 port 22\r\nAccess granted\r\n");
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
