<?php
// The calls of a domain that ended in a month, one JSON object a line:
//
//     export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
//     php month.php alpha.example.com 2026-01 calls.ndjson
//
// The file is there whole or not at all: every page came to its end, and calls and
// seconds are those that call_totals counts. Needs PHP 8.1 with curl.
declare(strict_types=1);

const FIELDS = 'xml_cdr_uuid,start_stamp,end_stamp,direction,accountcode,caller_id_number,destination_number,billsec';

/** An answer's pages; waits while the service is busy. */
function ask(string $route, array $query): Generator {
    $api = getenv('CDR_URL');
    $headers = [];
    $curl = curl_init();
    curl_setopt_array($curl, [
        CURLOPT_HTTPHEADER => ['Authorization: Bearer ' . getenv('CDR_TOKEN')],
        CURLOPT_RETURNTRANSFER => true,
        CURLOPT_CONNECTTIMEOUT => 10,
        CURLOPT_LOW_SPEED_LIMIT => 1,
        CURLOPT_LOW_SPEED_TIME => 600,
        CURLOPT_HEADERFUNCTION => function ($curl, string $line) use (&$headers): int {
            [$name, $value] = explode(':', $line, 2) + [1 => ''];
            $headers[strtolower($name)] = trim($value);
            return strlen($line);
        },
    ]);
    for ($url = "$api/$route?" . http_build_query($query), $tries = 10; $url;) {
        str_starts_with($url, "$api/")
            || throw new Exception("The next page is elsewhere, at $url: is CDR_API_PROXIES right?");
        curl_setopt($curl, CURLOPT_URL, $url);
        $headers = [];
        $body = curl_exec($curl);
        $body !== false || throw new Exception(curl_error($curl));  // it broke off, too
        $status = curl_getinfo($curl, CURLINFO_RESPONSE_CODE);
        if ($status === 200) {
            yield json_decode($body, true, flags: JSON_THROW_ON_ERROR);
            $url = preg_match('/^<(.+)>; rel="next"/', $headers['link'] ?? '', $found) ? $found[1] : null;
        } elseif (in_array($status, [429, 503], true) && --$tries) {
            $seconds = (int) ($headers['retry-after'] ?? 30);
            fwrite(STDERR, "$status: waiting $seconds s.\n");
            sleep($seconds);
        } else {
            throw new Exception("$status: $body");
        }
    }
}

function save_month(string $domain, string $month, string $file): string {
    $last = (new DateTimeImmutable("$month-01"))->format('Y-m-t');
    $query = ['domain_name' => $domain, 'from' => "$month-01", 'to' => $last, 'billable_only' => 'true'];
    $part = "$file." . getmypid();
    $output = new SplFileObject($part, 'x');
    $count = $seconds = 0;
    try {
        foreach (ask('call_range', $query + ['fields' => FIELDS, 'limit' => 10000]) as $calls) {
            foreach ($calls as $call) {
                $line = json_encode($call, JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES) . "\n";
                $output->fwrite($line) === strlen($line) || throw new Exception('The disk is full.');
                $count++;
                $seconds += $call['billsec'];
            }
        }
        [$total] = ask('call_totals', $query)->current();
        [$count, $seconds] === [$total['calls'], $total['billsec']]
            || throw new Exception("Read $count calls, $seconds seconds, but there are others now: run this again.");
        rename($part, $file) || throw new Exception("$file cannot be written.");
    } finally {
        file_exists($part) && unlink($part);
    }
    return "$count calls, $seconds seconds";
}

if ($argc !== 4 || !getenv('CDR_URL') || !getenv('CDR_TOKEN')) {
    fwrite(STDERR, "usage: CDR_URL=… CDR_TOKEN=… php {$argv[0]} DOMAIN YYYY-MM FILE\n");
    exit(1);
}
try {
    echo save_month($argv[1], $argv[2], $argv[3]), "\n";
} catch (Throwable $error) {
    fwrite(STDERR, "Nothing is kept: {$error->getMessage()}\n");
    exit(1);
}
