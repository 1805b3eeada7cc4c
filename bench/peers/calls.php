<?php
// Bare PHP: PDO over a persistent connection, fetchAll and json_encode.
declare(strict_types=1);

$pdo = new PDO(getenv('BENCH_PDO'), options: [PDO::ATTR_PERSISTENT => true]);

preg_match('/^Bearer (.+)$/', $_SERVER['HTTP_AUTHORIZATION'] ?? '', $found);
$query = str_replace('%s', '?', getenv('BENCH_TOKEN_QUERY'));
$token = $pdo->prepare($query);
$token->bindValue(1, hash('sha256', $found[1] ?? '', true), PDO::PARAM_LOB);
if (substr_count($query, '?') > 1) {
    $token->bindValue(2, $_GET['domain_name']);
}
$token->execute();
if (!$token->fetchColumn()) {
    http_response_code(401);
    exit;
}

if (getenv('BENCH_BEGIN')) {
    $pdo->exec(getenv('BENCH_BEGIN'));
}
$calls = $pdo->prepare(
    'SELECT ' . getenv('BENCH_COLUMNS') . ' FROM v_xml_cdr'
    . ' WHERE domain_uuid = md5(\'domain \' || ?)::uuid AND end_stamp >= to_timestamp(?) AND end_stamp < to_timestamp(?)'
    . ' ORDER BY end_stamp, xml_cdr_uuid'
);
$calls->execute([$_GET['domain_name'], (int) $_GET['from'], (int) $_GET['to'] + 1]);
header('Content-Type: application/json');
$rows = $calls->fetchAll(PDO::FETCH_ASSOC);
if (getenv('BENCH_BEGIN')) {
    $pdo->exec('COMMIT');
}
echo json_encode($rows, JSON_THROW_ON_ERROR);
