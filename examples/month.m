// The calls of a domain that ended in a month, in Excel (or Power BI). Data, Get Data,
// From Other Sources, Blank Query, Advanced Editor: paste this and change the first four
// values. When asked how to sign in, choose Anonymous: the token is in the header.
//
// It stays readable in the workbook: take one that reads this domain only
// (flask token create EMAIL --days 30), and do not send the workbook around.
let
    Api = "https://pbx.example.com/api",
    Token = "cdr_…",
    Domain = "alpha.example.com",
    Month = #date(2026, 1, 1),

    Range = [
        domain_name = Domain,
        from = Date.ToText(Month, [Format = "yyyy-MM-dd"]),
        to = Date.ToText(Date.EndOfMonth(Month), [Format = "yyyy-MM-dd"]),
        billable_only = "true"
    ],
    Fields = {
        "xml_cdr_uuid", "start_stamp", "end_stamp", "direction", "accountcode", "caller_id_number",
        "destination_number", "billsec"
    },

    // Web.Contents waits for Retry-After on 429 and 503 by itself, three times. JSON that broke
    // off has no closing bracket, so it is an error. There are no pages: the answer is a stream.
    Ask = (route as text, query as record) as list =>
        Json.Document(
            Web.Contents(
                Api,
                [
                    RelativePath = route,
                    Query = query,
                    Headers = [Authorization = "Bearer " & Token, Accept = "application/json"],
                    Timeout = #duration(0, 1, 0, 0)
                ]
            ),
            TextEncoding.Utf8
        ),

    // Read once: a second reading, of the sums or of the sheet, might find other calls.
    Answer = List.Buffer(Ask("call_range", Range & [fields = Text.Combine(Fields, ",")])),
    Total = Ask("call_totals", Range){0},
    Seconds = List.Sum({0} & List.Transform(Answer, each [billsec])),
    Whole = List.Count(Answer) = Total[calls] and Seconds = Total[billsec],

    // Text stays text: Excel runs no formula in it and keeps the zero that begins a number.
    Calls = Table.TransformColumnTypes(
        Table.FromRecords(Answer, Fields),
        List.Transform(Fields, each {_, if _ = "billsec" then Int64.Type else type text})
    )
in
    if Whole then Calls else error "The calls are not those that call_totals counts: refresh again."
